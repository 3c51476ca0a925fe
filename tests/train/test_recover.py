"""Stage `recover` on a pico model that is trained on additions and then damaged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import TrainingError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import example_id, split_path, write_examples
from cogumi.models.folders import Shape, load, save
from cogumi.models.lora import LoraShape
from cogumi.models.tokenization import HFTokenizer
from cogumi.train import recover, sft
from cogumi.train.batches import make_rows
from cogumi.train.loop import LoopConfig
from cogumi.train.losses import answer_loss, distillation
from cogumi.train.validation import applied, judge_answers, mean_figures
from support import pico

CONTEXT = Context(3, 1, Path(), lambda done, total, figures: None)
LORA = LoraShape(rank=6, alpha=6)
FAST = {"lr": 0.005, "batch": 16, "evaluate_every": 10, "checkpoint_every": 1000}


def artifact(path):
    return Artifact("test", path, "0", {}, {})


def example(question, answer):
    messages = (Message("user", question),)
    return Example(example_id("math", messages), "math", 1, messages, answer)


def prune(weight, share=0.5):
    """Zero the smallest weights of a matrix."""
    return weight * (weight.abs() > weight.abs().flatten().kthvalue(int(share * weight.numel())).values)


def rounded(weight, bits=2):
    """Round every row to a few levels."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def damaged(folder, out, damage):
    model = load(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(damage(weight))
    out.mkdir()
    save(model, folder, out)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Examples, a model trained on them, and the same model pruned and rounded."""
    root = tmp_path_factory.mktemp("recover")
    pico.make_tokenizer(root / "tokenizer")
    rows = [example(f"{a} plus {b}", str(a + b)) for a in range(10) for b in range(10)]
    for name in ("train", "selection"):
        write_examples(split_path(root / "data", name), rows)
    (root / "original").mkdir()
    loop = LoopConfig(steps=300, batch=25, lr=0.01, muon_lr=0.02, evaluate_every=300, checkpoint_every=1000)
    inputs = {"examples": artifact(root / "data"), "tokenizer": artifact(root / "tokenizer")}
    shape = Shape(hidden=64, layers=2, heads=2, feed_forward=128)
    sft.run(sft.Config(shape=shape, loop=loop), inputs, root / "original", CONTEXT)
    damaged(root / "original", root / "pruned", prune)
    damaged(root / "original", root / "rounded", rounded)
    return root


def recovered(world, out, model="pruned", original=True, **config):
    inputs = {"examples": artifact(world / "data"), "model": artifact(world / model)}
    if original:
        inputs["original"] = artifact(world / "original")
    out.mkdir(exist_ok=True)
    given = {"share": 1.0, "epochs": 6, "lora": LORA, "loop": FAST, **config}
    return recover.run(recover.Config.model_validate(given), inputs, out, CONTEXT)


def nats(world, folder, model=None):
    examples = [example(f"{a} plus {b}", str(a + b)) for a in range(10) for b in range(10)]
    rows = make_rows(examples, HFTokenizer.load(folder), 512)
    return mean_figures(applied(model or load(folder)), rows, answer_loss)["loss"]


@pytest.mark.parametrize("model", ["pruned", "rounded"])
def test_recovery_reduces_the_loss_of_the_written_weights(world, tmp_path, model):
    metrics = recovered(world, tmp_path, model)
    assert metrics["distilled"]
    assert metrics["returned"] == "recovered"
    assert metrics["won_back"] > 0.3
    assert metrics["original"]["nats"] < metrics["recovered"]["nats"] < metrics["damaged"]["nats"]
    assert nats(world, tmp_path) == pytest.approx(metrics["recovered"]["nats"], rel=1e-5)
    assert nats(world, world / model) == pytest.approx(metrics["damaged"]["nats"], rel=1e-5)
    assert metrics["quality_ratio"] == pytest.approx(
        metrics["original"]["perplexity"] / metrics["recovered"]["perplexity"]
    )


def test_default_rates(world, tmp_path):
    config = recover.Config()
    assert (config.share, config.epochs, config.loop.lr, config.loop.clip) == (0.02, 2, 8e-7, 0.3)
    metrics = recovered(world, tmp_path, share=0.02, epochs=2, loop={})
    assert metrics["hardest"]["rows"] == 2
    assert metrics["steps_planned"] == 2


def test_recovery_never_makes_a_model_worse(world, tmp_path):
    """With a destructive rate, training ends at its first validation and the input weights are returned unchanged."""
    metrics = recovered(world, tmp_path, loop={**FAST, "lr": 0.3, "clip": 100.0}, epochs=10)
    assert metrics["returned"] == "damaged"
    assert metrics["steps"] == 10 < metrics["steps_planned"]
    assert metrics["curve"]["selection"][0][1] > metrics["damaged"]["nats"]
    assert metrics["recovered"] == metrics["damaged"]
    assert metrics["won_back"] == 0
    before, after = load(world / "pruned").state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lower_loss_with_fewer_exact_answers_is_rejected():
    before = {"loss": 1.0, "exact": 0.5}
    assert recover.better({"loss": 0.9, "exact": 0.5}, before)
    assert not recover.better({"loss": 0.5, "exact": 0.49}, before)
    assert not recover.better({"loss": 1.0, "exact": 0.6}, before)


def test_pruned_weights_stay_zero_if_configured(world, tmp_path):
    kept = recovered(world, tmp_path / "kept", mask="keep")
    free = recovered(world, tmp_path / "free")
    assert kept["zeros"]["after"] >= kept["zeros"]["before"] > 0
    assert free["zeros"]["after"] < free["zeros"]["before"]
    assert kept["won_back"] > 0
    pruned = load(world / "pruned").state_dict()
    after = load(tmp_path / "kept").state_dict()
    for name, weight in pruned.items():
        if name.endswith("proj.weight"):
            assert not after[name][weight == 0].any()
            assert not torch.equal(after[name], weight)
    # the written weights are the validated ones
    best = min(value for _, value, _ in kept["curve"]["selection"])
    assert kept["recovered"]["nats"] == pytest.approx(best, rel=1e-4)


def test_unmerged_adapter_is_written_beside_the_unchanged_model(world, tmp_path):
    metrics = recovered(world, tmp_path, merge=False)
    before, after = load(world / "pruned").state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter")
    assert metrics["returned"] == "recovered"
    assert nats(world, tmp_path, adapted) == pytest.approx(metrics["recovered"]["nats"], rel=1e-4)


def test_distillation_needs_a_large_loss_and_an_original_model(world, tmp_path):
    without = recovered(world, tmp_path / "a", original=False)
    assert (without["distilled"], without["won_back"]) == (False, None)
    assert not recovered(world, tmp_path / "b", distil_above=1e6)["distilled"]


def test_divergence_is_zero_only_for_equal_models(world):
    rows = make_rows([example("3 plus 4", "7"), example("9 plus 9", "18")], HFTokenizer.load(world / "original"), 64)
    original, other = load(world / "original"), load(world / "rounded")
    loss = distillation(original)
    assert mean_figures(applied(original), rows, loss)["loss"] == pytest.approx(0, abs=1e-6)
    assert mean_figures(applied(other), rows, loss)["loss"] > 0.01


def test_surprise_of_a_row_does_not_depend_on_the_batch(world):
    model, tokenizer = load(world / "pruned"), HFTokenizer.load(world / "pruned")
    rows = make_rows([example(f"{a} plus {b}", str(a + b)) for a in range(4) for b in range(9)], tokenizer, 64)
    found = recover.log_perplexity(applied(model), rows)
    assert found == pytest.approx([judge_answers(applied(model), [row])["loss"] for row in rows], rel=1e-4)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=60), st.floats(0.001, 1))
@settings(max_examples=50, deadline=None)
def test_hardest_rows_have_the_highest_loss(nats, share):
    chosen = recover.hardest(np.array(nats), share)
    rest = [nats[i] for i in range(len(nats)) if i not in chosen]
    assert len(set(chosen)) == len(chosen) == max(1, round(share * len(nats)))
    assert not rest or min(nats[i] for i in chosen) >= max(rest)


def test_invalid_inputs_are_refused(world, tmp_path):
    with pytest.raises(TrainingError, match="mask: keep holds zeros in merged weights"):
        recovered(world, tmp_path, mask="keep", merge=False)
    pico.make_model(tmp_path / "other", hidden=32, layers=1, vocab=400)
    inputs = {name: artifact(world / path) for name, path in (("examples", "data"), ("model", "pruned"))}
    with pytest.raises(TrainingError, match="another vocabulary than the model to recover"):
        recover.run(recover.Config(), {**inputs, "original": artifact(tmp_path / "other")}, tmp_path, CONTEXT)
    write_examples(split_path(tmp_path / "none", "train"), [])
    write_examples(split_path(tmp_path / "none", "selection"), [])
    with pytest.raises(TrainingError, match="no examples to train on"):
        recover.run(recover.Config(), {**inputs, "examples": artifact(tmp_path / "none")}, tmp_path, CONTEXT)
