"""Distillation on failed questions with rehearsal, merging of adapters, and recipes that continue others."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import RecipeError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.types import Artifact
from cogumi.data.examples import SPLITS, split_path, write_examples
from cogumi.data.responses import Response, write_responses
from cogumi.models.folders import Shape, load
from cogumi.models.lora import LoraShape
from cogumi.models.tokenization import HFTokenizer
from cogumi.pipeline.recipe import load_recipe
from cogumi.train import distill, merge, modifier, sft
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig
from support import pico
from support.train import context, example

LOOP = {"steps": 120, "batch": 32, "lr": 0.005, "evaluate_every": 40, "checkpoint_every": 100, "warmup": 2}
SHAPE = Shape(hidden=64, layers=2, heads=2, feed_forward=128)
LEARNED = [example(f"say {a}", a, 1, "math") for a in "abcdefghijklmnop"]
FAILED = [example(f"after {a} comes", chr(ord(a) + 1), 3, "code") for a in "abcdefghijklmno"]


def artifact(path, **metrics):
    return Artifact("test", path, "0", {}, metrics)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base that can repeat letters but cannot continue them, and its graded responses."""
    root = tmp_path_factory.mktemp("distill")
    pico.make_tokenizer(root / "tokenizer")
    for name in SPLITS:
        write_examples(split_path(root / "some", name), LEARNED)
        write_examples(split_path(root / "all", name), LEARNED + FAILED)
    (root / "base").mkdir()
    inputs = {"examples": artifact(root / "some"), "tokenizer": artifact(root / "tokenizer")}
    sft.run(
        sft.Config(shape=SHAPE, loop=LoopConfig(**LOOP | {"lr": 0.02, "muon_lr": 0.02})),
        inputs,
        root / "base",
        context(),
    )
    (root / "responses").mkdir()
    rows = [(e, True) for e in LEARNED] + [(e, False) for e in FAILED]
    write_responses(root / "responses", [Response(e.id, e.answer, right, "", 0.5, 2, True) for e, right in rows])
    return {
        "examples": artifact(root / "all"),
        "responses": artifact(root / "responses"),
        "model": artifact(root / "base"),
    }


def test_failed_questions_are_learned_and_others_kept(trained, tmp_path):
    config = distill.Config(rehearsal=0.4, forget=0.3, lora=LoraShape(rank=14), loop=LoopConfig(**LOOP))
    before = sha256(trained["model"].path / "model.safetensors")
    metrics = distill.run(config, trained, tmp_path, context())
    assert metrics["failed"] == 15
    assert metrics["rehearsed"] == round(15 * 0.4 / 0.6)
    assert metrics["learned"] > 0.5
    assert metrics["forgotten"] <= 0.3
    assert load(tmp_path).config.hidden_size == 64
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    assert sha256(trained["model"].path / "model.safetensors") == before


def test_training_stops_at_the_forgetting_limit(trained, tmp_path):
    """Without rehearsal and with a destructive learning rate: weights beyond the forgetting limit are never kept."""
    loop = LoopConfig(**LOOP | {"lr": 0.3, "evaluate_every": 10})
    metrics = distill.run(distill.Config(rehearsal=0, forget=0.1, lora=None, loop=loop), trained, tmp_path, context())
    assert metrics["stopped"].startswith("forgot ")
    assert metrics["steps"] < 120
    last = metrics["curve"]["selection"][-1][1]
    assert 1 - last["known/exact"] > 0.1
    assert metrics["forgotten"] <= 0.1


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0, 0.9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_rehearsal_has_the_configured_share(failed, known, share, seed):
    examples = [example(f"{i}", "x", 1, "math") for i in range(failed + known)]
    random.Random(seed).shuffle(examples)
    correct = {e.id: i >= failed for i, e in enumerate(examples)}
    rows = distill.questions_to_learn(examples, correct, distill.Config(rehearsal=share), seed)
    right = sum(correct[e.id] for e in rows)
    assert len(rows) - right == failed
    assert right == min(known, round(failed * share / (1 - share)))
    assert rows == distill.questions_to_learn(examples, correct, distill.Config(rehearsal=share), seed)


def test_nothing_to_distil_is_reported(trained, tmp_path):
    with pytest.raises(TrainingError, match="failed no training question of 'tools'"):
        distill.run(distill.Config(domain="tools"), trained, tmp_path, context())


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    config = modifier.Config(domain="code", lora=LoraShape(rank=14), loop=LoopConfig(**LOOP))
    return artifact(out, **modifier.run(config, trained, out, context()))


def test_modifier_reports_its_gain_and_its_loss_on_other_domains(adapter):
    figures = adapter.metrics
    assert figures["exact"]["before"] < 0.2
    assert figures["gain"] == figures["exact"]["after"] - figures["exact"]["before"] > 0.5
    assert figures["exact_elsewhere"]["before"] == 1
    assert figures["exact_elsewhere"]["after"] <= 1
    nats = figures["selection_nats_per_token"]
    assert nats["merged"] == pytest.approx(nats["attached"], abs=1e-4)


def test_merged_adapter_gives_the_same_answers(trained, adapter, tmp_path):
    metrics = merge.run(merge.Config(), {**trained, "adapter": adapter}, tmp_path, context())
    assert metrics["merged"]["loss"] == pytest.approx(metrics["attached"]["loss"], abs=1e-4)
    assert metrics["merged"]["loss"] < metrics["base"]["loss"] - 0.1
    from cogumi.models.lora import with_adapter

    tokenizer = HFTokenizer.load(tmp_path)
    ids = torch.tensor([make_rows(FAILED[:1], tokenizer, 64)[0].ids])
    with torch.no_grad():
        attached = with_adapter(load(trained["model"].path), adapter.path).eval()(input_ids=ids).logits
        assert torch.allclose(load(tmp_path)(input_ids=ids).logits, attached, atol=1e-4)


def test_merging_an_adapter_of_another_base_is_refused(trained, adapter, tmp_path):
    foreign = artifact(adapter.path, **adapter.metrics | {"base_sha256": "0" * 64})
    with pytest.raises(TrainingError, match="was trained on another base"):
        merge.run(merge.Config(), {**trained, "adapter": foreign}, tmp_path, context())


def test_recipe_continues_another_in_its_folder(tmp_path):
    (tmp_path / "first.yaml").write_text("name: first\nseed: 5\nsteps: [{name: data, stage: world}]")
    second = "name: second\nextends: first.yaml\nsteps: [{name: more, stage: tokenizer, inputs: {examples: data}}]"
    (tmp_path / "second.yaml").write_text(second)
    recipe = load_recipe(tmp_path / "second.yaml")
    assert [step.name for step in recipe.steps] == ["data", "more"]
    assert (recipe.name, recipe.folder, recipe.seed) == ("second", "first", 5)
    assert load_recipe(tmp_path / "first.yaml").folder == "first"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml\nsteps: [{name: x, stage: world}]", "there is no recipe file"),
        ("extends: loop.yaml\nsteps: [{name: x, stage: world}]", "extends itself"),
        ("extends: tiny\nseed: 3\nsteps: [{name: x, stage: world}]", "the seed is that of 'tiny'"),
        ("extends: tiny\nsteps: [{name: base, stage: world}]", "two steps of this name"),
        ("steps: [{name: logs, stage: world}]", "the folder of training curves has this name"),
    ],
)
def test_recipes_that_cannot_continue_are_refused(tmp_path, text, message):
    (tmp_path / "loop.yaml").write_text(f"name: loop\n{text}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "loop.yaml")
