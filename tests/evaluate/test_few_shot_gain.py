"""The few-shot measurement: every control is measured on the same episodes, by greedy decoding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.episodes import read_episodes
from cogumi.evaluate import few_shot_gain
from cogumi.evaluate.few_shot_gain import CONTROLS, Config, Judge, gains
from cogumi.models import head_adaptation as heads
from cogumi.models.head_adaptation import Rates
from cogumi.models.inner_loop import example_row, states
from cogumi.train import anil
from support import episodes, pico

LOOP = {"steps": 60, "batch": 8, "lr": 0.01, "evaluate_every": 20, "warmup": 1}
TRAINING = {"lora": {"rank": 2, "alpha": 4}, "head_rank": 8, "inner": {"lr": 0.3, "steps": 3}, "loop": LOOP}
SMALL = Config(shots=(1, 2, 4), queries=5, lrs=(0.1, 0.3), steps=(3,), resamples=100)


def context():
    return Context(3, 1, Path(), lambda done, total, figures: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("fewshot")
    pico.make_model(root / "base", hidden=32, layers=1)
    episodes.write(root / "episodes")
    found = {"model": Artifact("x", root / "base", "0"), "episodes": Artifact("x", root / "episodes", "0")}
    for method in ("anil", "plain", "fomaml"):
        (root / method).mkdir()
        steps = LOOP if method != "fomaml" else {**LOOP, "steps": 2}
        config = anil.Config(**{**TRAINING, "loop": steps}, method=method)
        metrics = anil.run(config, found, root / method, context())
        found[method] = Artifact("adapter", root / method, "0", {}, metrics)
    return found


@pytest.fixture(scope="module")
def measured(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    base = sha256(inputs["model"].path / "model.safetensors")
    metrics = few_shot_gain.run(SMALL, {**inputs, "anil_2": inputs["anil"]}, out, context())
    assert sha256(inputs["model"].path / "model.safetensors") == base
    return metrics, out


def test_all_controls_are_reported(measured):
    metrics, out = measured
    assert set(metrics["accuracy"]) == {*CONTROLS, "anil", "fomaml"}
    assert metrics["runs"] == {"zero_shot": 1, "in_context": 1, "anil": 2, "scratch": 2, "plain": 1, "fomaml": 1}
    assert metrics["draws"] == 2
    for by_shots in metrics["accuracy"].values():
        assert list(by_shots) == ["1", "2", "4"]
    report = (out / "report.md").read_text()
    assert all(f"| {method} |" in report for method in metrics["accuracy"])
    assert "1-shot: " in report
    assert (out / "shots.png").stat().st_size > 5000


def test_gain_is_over_the_best_control_and_inside_its_interval(measured):
    accuracy, gain = measured[0]["accuracy"], measured[0]["gain"]
    for k in ("1", "2", "4"):
        best = max(accuracy[control][k] for control in CONTROLS)
        assert gain[k]["gain"] == pytest.approx(accuracy["anil"][k] - best, abs=2e-4)
        assert gain[k]["low"] <= gain[k]["gain"] + 0.2
        assert gain[k]["low"] <= gain[k]["high"]


def test_examples_improve_an_adaptable_head_and_zero_shot_is_low(measured):
    accuracy = measured[0]["accuracy"]
    assert accuracy["zero_shot"] == {"1": 0.0, "2": 0.0, "4": 0.0}  # the words are drawn independently
    assert accuracy["anil"]["4"] > 0.4
    assert accuracy["scratch"]["2"] > accuracy["zero_shot"]["2"]


def test_zero_shot_does_not_depend_on_the_examples(inputs):
    judge = Judge(inputs["model"], SMALL)
    episode, other = read_episodes(inputs["episodes"].path, "heldout")[:2]
    swapped = few_shot_gain.Episode(
        episode.id, episode.family, episode.rule, "", 0, other.support, episode.query
    )  # fmt: skip
    assert judge.in_context(episode, 0) == judge.in_context(swapped, 0)


def test_in_context_examples_are_conversation_turns(inputs):
    judge = Judge(inputs["model"], SMALL)
    episode = read_episodes(inputs["episodes"].path, "heldout")[0]
    one, two, query = *episode.support[:2], episode.query[0]
    text = judge.tokenizer.raw.decode(
        list(example_row(query, judge.tokenizer, 200, (one, two)).ids), skip_special_tokens=False
    )
    said = [f"<|user|>{e.messages[0].content}<|end|><|assistant|>{e.answer}<|end|>" for e in (one, two, query)]
    assert text == "".join(said)


def test_k_shot_uses_only_the_first_k_examples(inputs):
    """The states of all shots are computed in one batch; k-shot must equal the result with only k examples."""
    judge = Judge(inputs["model"], SMALL)
    episode = read_episodes(inputs["episodes"].path, "heldout")[1]
    start, rates, _ = heads.load(inputs["anil"].path / heads.FILE)
    model = judge.adapter(inputs["anil"])
    seen = judge.episode_states(model, episode)
    with torch.no_grad():
        for k in (1, 2, 4):
            alone, _ = states(model, [example_row(e, judge.tokenizer, 200) for e in episode.support[:k]])
            some = seen.support.select(seen.example < k)
            one, other = heads.adapt(start, alone, rates), heads.adapt(start, some, rates)
            torch.testing.assert_close(one.b, other.b, atol=1e-5, rtol=1e-4)


def test_learning_rates_of_controls_are_selected_on_the_selection_families(inputs):
    judge = Judge(inputs["model"], Config(shots=(2,), queries=5, lrs=(1e-6, 0.3), steps=(1, 3)))
    selection = read_episodes(inputs["episodes"].path, "selection")
    start = heads.initial_head(8, 32, 32, judge.plain.lm_head.out_features, 0)
    accuracy, rates = judge.head(judge.plain, start, None, selection)
    assert rates.lr == 0.3
    worst = judge.head(judge.plain, start, Rates(lr=1e-6, steps=1), selection)[0]
    assert sum(accuracy(e, 2) for e in selection) > sum(worst(e, 2) for e in selection)


@given(st.integers(0, 1000), st.floats(-0.3, 0.3))
@settings(max_examples=20, deadline=None)
def test_interval_covers_a_known_gain(seed, gain):
    """Equal episodes give an interval of zero width; noisy ones give an interval around the figure."""
    rng = np.random.default_rng(seed)
    draws = [d for d in range(5) for _ in range(8)]
    flat = {m: [np.full((1, 40), 0.5)] for m in CONTROLS}
    sure = gains({**flat, "anil": [np.full((1, 40), 0.5 + gain)]}, draws, Config(shots=(3,), resamples=100), seed)["3"]
    assert sure["low"] == sure["gain"] == sure["high"] == round(gain, 4)
    noisy = {**flat, "anil": [0.5 + gain + rng.normal(0, 0.1, (1, 40))]}
    found = gains(noisy, draws, Config(shots=(3,), resamples=200), seed)["3"]
    assert found["low"] < found["gain"] < found["high"]


def test_adapter_of_another_base_is_refused(inputs, tmp_path):
    other = pico.make_model(tmp_path / "other", hidden=32, layers=1, seed=5)
    with pytest.raises(ArtifactError, match="trained on another base"):
        few_shot_gain.run(SMALL, {**inputs, "model": Artifact("x", other, "0")}, tmp_path, context())


def test_episodes_without_a_held_out_set_are_refused(inputs, tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        few_shot_gain.run(SMALL, {**inputs, "episodes": Artifact("x", tmp_path, "0")}, tmp_path, context())
