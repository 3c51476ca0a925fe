"""`train.loop`: bit-identical resumption, equal curves with two processes, early stopping, and errors."""

import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cogumi.core.errors import CogumiError, TrainingError
from cogumi.core.files import sha256
from cogumi.evaluate.suites import training
from cogumi.models.folders import Shape, build
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.autocast import TILE, computing, uses_bf16
from cogumi.train.batches import collate
from cogumi.train.checkpoint import Progress, trained
from cogumi.train.loop import LoopConfig, learning_rate, reason_to_stop, train
from cogumi.train.losses import answer_figures, answer_logits, answer_loss
from cogumi.train.validation import applied, judge_answers
from support import pico
from support.train import SHAPE, context, sums

CONFIG = {
    "steps": 40, "batch": 8, "lr": 0.01, "muon_lr": 0.02, "evaluate_every": 10, "checkpoint_every": 3, "warmup": 2,
}  # fmt: skip
SHARDED = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_reshard_after_forward: true,
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer, fsdp_state_dict_type: FULL_STATE_DICT}
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pico.make_tokenizer(folder)
    return HFTokenizer.load(folder)


def launch(root, out, *before, **what):
    """Run `support.train` in a separate process, or under a launcher."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, *before, "-m", "support.train", root, out, json.dumps({"config": CONFIG} | what)]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return [int(line) for line in out.split() if line.isdigit()]


def stop_at(process, step):
    for line in process.stdout:
        if int(line) >= step:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its root and its folder."""
    root = tmp_path_factory.mktemp("whole")
    assert finished(launch(root, root / "out"))[-1] == 40
    return root, root / "out"


def test_killed_at_any_step_and_resumed_gives_the_same_weights(whole, tmp_path):
    root, out = whole
    for step in (7, 25):
        stop_at(launch(root, tmp_path), step)
        assert not (tmp_path / "weights.safetensors").exists()
    assert finished(launch(root, tmp_path))[0] > 20  # it resumed from its checkpoint
    for name in ("weights.safetensors", "curve.json"):
        assert sha256(tmp_path / name) == sha256(out / name)


@given(st.integers(1, 19))
@settings(max_examples=5, deadline=None)
def test_resumption_restores_random_states(tokenizer, tmp_path_factory, step):
    """With dropout in every step, an interruption between two checkpoints does not change the adapter."""

    def weights(out, until):
        def progress(done, total, figures):
            if done == until:
                raise KeyboardInterrupt

        model = attach(build(SHAPE, tokenizer, 0), LoraShape(rank=6, dropout=0.2), 0)
        config = LoopConfig(**CONFIG | {"steps": 20, "muon_lr": None})
        train(model, sums(tokenizer), answer_loss, config, out, context(progress=progress))
        return torch.cat([p.detach().flatten() for p in trained(model).values()])

    out = tmp_path_factory.mktemp("run")
    with pytest.raises(KeyboardInterrupt):
        weights(out / "cut", step)
    assert torch.equal(weights(out / "cut", None), weights(out / "whole", None))


@pytest.mark.parametrize("sharded", [False, True], ids=["data parallel", "sharded"])
def test_two_processes_give_the_curve_of_one(tmp_path, sharded):
    """Batches of 7 of 100 rows: the shares of the processes differ, and in one batch only one process has a row."""
    config = CONFIG | {"batch": 7, "muon_lr": None, "accumulate": 2}
    finished(launch(tmp_path, tmp_path / "one", config=config))
    launcher = ["-m", "accelerate.commands.launch"]
    if sharded:
        (tmp_path / "sharded.yaml").write_text(SHARDED)
        launcher += ["--config_file", tmp_path / "sharded.yaml"]
    else:
        launcher += ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no"]
    finished(launch(tmp_path, tmp_path / "two", *launcher, "--main_process_port", "0", config=config))
    one, two = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("one", "two"))
    for kind in ("losses", "validations"):
        assert [step for step, _ in one[kind]] == [step for step, _ in two[kind]]
        for (_, ours), (_, theirs) in zip(one[kind], two[kind], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=2e-3)


def test_accumulated_gradients_equal_those_of_the_full_batch(tokenizer, tmp_path):
    rows = sums(tokenizer)
    found = []
    for parts in (1, 3):
        model = build(SHAPE, tokenizer, 0)
        config = LoopConfig(**CONFIG | {"steps": 3, "accumulate": parts, "muon_lr": None})
        train(model, rows, answer_loss, config, tmp_path / str(parts), context())
        found.append(model.model.norm.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.equal(found[0], torch.ones_like(found[0]))


def test_memory_options_do_not_change_gradients(tokenizer, tmp_path):
    """Gradient checkpointing gives the same weights; bf16 gives nearly the same; `auto` is one of both formats."""
    rows, found = sums(tokenizer), {}
    options = {"plain": {}, "twice": {"gradient_checkpointing": True}}
    options |= {name: {"precision": name} for name in ("bf16", "auto")}
    for name, option in options.items():
        model = build(SHAPE, tokenizer, 0)
        train(model, rows, answer_loss, LoopConfig(**CONFIG | {"steps": 4} | option), tmp_path / name, context())
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(found["plain"], found["twice"])
    assert not torch.equal(found["plain"], found["bf16"])
    assert torch.equal(found["auto"], found["bf16" if uses_bf16("auto", "cpu") else "plain"])
    assert torch.nn.functional.cosine_similarity(found["plain"], found["bf16"], dim=0) > 0.98


def test_padding_to_tiles_changes_no_figure(tokenizer):
    """Rows of a bf16 computation are padded to whole tiles; in fp32 such rows give the same figures as plain ones."""
    model, rows = build(SHAPE, tokenizer, 0), sums(tokenizer)[:8]
    plain = collate(rows, range(8))
    assert plain.in_tiles() is plain
    with computing("bf16", "cpu"):
        padded = plain.in_tiles()
        assert [len(part) for part in answer_logits(model, plain)] == [int((plain.labels >= 0).sum())] * 3
    assert padded.ids.shape[1] % TILE == 0 < padded.ids.shape[1] - plain.ids.shape[1]
    for expected, found in zip(answer_figures(model, plain), answer_figures(model, padded), strict=True):
        assert torch.allclose(expected.float(), found.float(), atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_warms_up_and_decays_to_its_final_share(schedule):
    config = LoopConfig(steps=100, warmup=10, final_lr=0.1, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)


def test_early_stopping_keeps_the_best_weights(tokenizer, tmp_path):
    model = build(SHAPE, tokenizer, 0)
    seen = []

    def validate(apply):  # best at the second validation, worse afterwards
        seen.append(model.model.norm.weight.detach().clone())
        return {"loss": [3.0, 1.0, 2.0, 2.5, 2.0, 2.0][len(seen) - 1]}

    config = LoopConfig(steps=60, batch=4, evaluate_every=5, patience=3, checkpoint_every=1000, keep=2)
    at = train(model, sums(tokenizer), answer_loss, config, tmp_path, context(), validate)
    assert (at.step, at.best_step, at.best) == (25, 10, 1.0)
    assert at.stopped == "no improvement in 3 validations"
    assert torch.equal(model.model.norm.weight, seen[1])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["15.safetensors"]
    second = load_file(tmp_path / "best" / "15.safetensors")
    assert torch.equal(second["model.norm.weight"], seen[2])


def test_validation_can_stop_the_training(tokenizer, tmp_path):
    """Weights for which validation stops the training are not kept, however low their loss.

    The initial weights are candidates too.
    """
    model = build(SHAPE, tokenizer, 0)
    config = LoopConfig(steps=60, batch=4, evaluate_every=5)
    losses = iter([3.0, 2.5, 1.0])
    at = train(
        model, sums(tokenizer), answer_loss, config, tmp_path, context(), lambda apply: {"loss": next(losses)},
        stop=lambda figures: "forgot too much" if figures["loss"] < 2 else "",
    )  # fmt: skip
    assert (at.step, at.best_step, at.stopped) == (10, 5, "forgot too much")


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_reasons_to_stop(losses, patience):
    at = Progress(step=10 * len(losses), norms=1e-4)
    at.validations = [(10 * (i + 1), {"loss": loss}) for i, loss in enumerate(losses)]
    assert reason_to_stop(at, LoopConfig(patience=patience)) == ""
    flat = reason_to_stop(at, LoopConfig(patience=patience, plateau=0.01))
    recent = [math.exp(loss) for loss in losses[-patience - 1 :]]
    assert ("perplexity" in flat) == (len(losses) > patience and max(recent) < 1.01 * min(recent) + 1e-12)
    assert "gradient" in reason_to_stop(at, LoopConfig(patience=patience, gradient_floor=1e-4))


def test_exact_answers_equal_those_of_greedy_decoding(tokenizer, tmp_path):
    model = build(SHAPE, tokenizer, 0)
    rows = sums(tokenizer)
    train(model, rows, answer_loss, LoopConfig(**CONFIG), tmp_path, context())
    right = []
    for row in rows:
        ids = list(row.ids[: row.start])
        while len(ids) < len(row.ids):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        right.append(tuple(ids) == row.ids)
    groups = ["low" if i < 50 else "high" for i in range(100)]
    figures = judge_answers(applied(model), rows, groups)
    assert 0 < sum(right) < 100
    assert figures["exact"] == sum(right) / 100
    assert figures["exact/low"] == sum(right[:50]) / 50
    assert figures["loss"] == pytest.approx(float(applied(model)(answer_loss, collate(rows, range(100)))[0]), rel=1e-5)


def test_curves_are_written_for_tensorboard(tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, rows, logs = build(SHAPE, tokenizer, 0), sums(tokenizer), tmp_path / "logs"
    train(
        model, rows, answer_loss, LoopConfig(**CONFIG), tmp_path, context(logs=logs),
        lambda apply: judge_answers(apply, rows[:9]),
    )  # fmt: skip
    seen = EventAccumulator(str(logs)).Reload()
    assert [event.step for event in seen.Scalars("selection/exact")] == [10, 20, 30, 40]
    losses = [event.value for event in seen.Scalars("training/loss")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_values_stop_the_training_with_step_and_rows(tokenizer, tmp_path, where):
    def broken(model, batch):
        loss = answer_loss(model, batch)[0]
        if 2 in batch.index.tolist():
            loss = loss * float("nan") if where == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss, {"loss": 0.0}

    rows = [Row((5, 6, 7), 1, f"question-{i}") for i in range(4)]
    message = rf"{where}.* is (nan|inf) at step \d+ on .*question-2.*; lower the learning rate or check these rows"
    with pytest.raises(TrainingError, match=message):
        train(build(SHAPE, tokenizer, 0), rows, broken, LoopConfig(steps=9, batch=2), tmp_path, context())


def test_checkpoint_of_another_model_is_refused(tokenizer, tmp_path):
    rows, config = sums(tokenizer), LoopConfig(**CONFIG | {"steps": 4})
    train(build(SHAPE, tokenizer, 0), rows, answer_loss, config, tmp_path, context())
    wider = build(Shape(hidden=64, layers=1, heads=1, feed_forward=64), tokenizer, 0)
    with pytest.raises(TrainingError, match="belongs to another model"):
        train(wider, rows, answer_loss, config, tmp_path, context())


def test_adapter_checkpoint_of_another_base_is_refused(tokenizer, tmp_path):
    rows, config = sums(tokenizer), LoopConfig(**CONFIG | {"steps": 4, "muon_lr": None})
    train(attach(build(SHAPE, tokenizer, 0), LoraShape(rank=4), 0), rows, answer_loss, config, tmp_path, context())
    before = sha256(tmp_path / "checkpoint" / "checkpoint.safetensors")
    with pytest.raises(TrainingError, match="an adapter on another base; delete it to start this step again"):
        train(attach(build(SHAPE, tokenizer, 1), LoraShape(rank=4), 0), rows, answer_loss, config, tmp_path, context())
    assert sha256(tmp_path / "checkpoint" / "checkpoint.safetensors") == before


def test_damaged_checkpoint_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.safetensors").write_bytes(b"\x07" * 40)
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors cannot be read .*delete it"):
        train(build(SHAPE, tokenizer, 0), sums(tokenizer), answer_loss, LoopConfig(**CONFIG), tmp_path, context())


def test_full_disk_keeps_the_previous_checkpoint(whole, tmp_path):
    """From some step on, files are limited to a few bytes: the run ends, and it resumes once there is space."""
    root, out = whole
    process = launch(root, tmp_path)
    for line in process.stdout:
        if int(line) >= 10:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
            break
    process.communicate()
    assert process.returncode not in (0, -signal.SIGKILL)
    assert not (tmp_path / "weights.safetensors").exists()
    assert finished(launch(root, tmp_path))[0] > 3
    assert sha256(tmp_path / "weights.safetensors") == sha256(out / "weights.safetensors")


def test_reference_loop_of_the_speed_suite_does_the_same_work(tmp_path, monkeypatch):
    """Both must give equal weights, otherwise the ratio of times is meaningless."""
    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "LOOP", training.LOOP.model_copy(update={"steps": 4, "batch": 8}))
    monkeypatch.setattr(training, "BATCH", 8)
    assert training._turn(tmp_path / "same", seed=1) > 0
    monkeypatch.setattr(training, "BATCH", 4)
    with pytest.raises(CogumiError, match="did not do the same work"):
        training._turn(tmp_path / "other", seed=1)


def test_empty_training_set_is_refused(tokenizer, tmp_path):
    model = build(SHAPE, tokenizer, 0).requires_grad_(False)
    with pytest.raises(TrainingError, match="this model has no trainable weights"):
        train(model, sums(tokenizer), answer_loss, LoopConfig(), tmp_path, context())
    assert not trained(model)
