"""Stage `anil`: inner gradient descent, a first-order outer gradient, and adaptation that leaves no state."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from cogumi.core.errors import ArtifactError, DataError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.types import Artifact
from cogumi.data.episodes import read_episodes
from cogumi.models import head_adaptation as heads
from cogumi.models.answer_match import exact
from cogumi.models.folders import load
from cogumi.models.head_adaptation import Head, Rates, States
from cogumi.models.inner_loop import adapt_weights, example_row, states, weights_of
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train import anil
from support import episodes, pico
from support.train import context

LOOP = {"steps": 4, "batch": 4, "lr": 0.01, "evaluate_every": 2, "checkpoint_every": 2, "warmup": 1}
SMALL = {"lora": {"rank": 2, "alpha": 4}, "head_rank": 4, "inner": {"lr": 0.1, "steps": 2}, "loop": LOOP}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("anil")
    pico.make_model(root / "base", hidden=32, layers=1)
    episodes.write(root / "episodes")
    return {name: Artifact("x", root / folder, "0") for name, folder in (("model", "base"), ("episodes", "episodes"))}


@pytest.fixture(scope="module")
def parts(inputs):
    """A learner with adapters that have an effect, and tasks."""
    base = inputs["model"].path
    tokenizer = HFTokenizer.load(base)
    lm = attach(load(base), LoraShape(rank=2, alpha=4), 0)
    generator = torch.Generator().manual_seed(1)
    for weight in weights_of(lm).values():
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    start = heads.initial_head(4, 8, 32, lm.get_base_model().lm_head.out_features, 0)
    start.b.copy_(0.05 * torch.randn(start.b.shape, generator=generator))
    config = anil.Config(**SMALL)
    tasks = anil.tasks_of(read_episodes(inputs["episodes"].path, "train"), tokenizer, 64, config)
    return anil.Learner(lm, start), tasks


def some_states(seed, n=5, width=6, vocabulary=9):
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, width, generator=g), torch.randn(n, vocabulary, generator=g)
    return States(*drawn, torch.randint(vocabulary, (n,), generator=g))


def some_head(seed, rank=3, width=6, vocabulary=9):
    g = torch.Generator().manual_seed(seed)
    return Head(torch.randn(rank, width, generator=g), torch.randn(vocabulary, rank, generator=g), 1.5)


@given(st.integers(0, 10_000), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_inner_gradient_equals_autograd(seed, n):
    seen, head = some_states(seed, n), some_head(seed + 1)
    a, b = head.a.requires_grad_(), head.b.requires_grad_()
    expected = torch.autograd.grad(cross_entropy(heads.logits(head, seen), seen.targets), (a, b))
    found = heads.gradient(Head(a.detach(), b.detach(), head.scale), seen)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_adaptation_is_gradient_descent_and_does_not_change_the_head():
    seen, head = some_states(0), some_head(1)
    before = head.a.clone(), head.b.clone()
    found = heads.adapt(head, seen, Rates(lr=0.1, steps=3))
    a, b = (t.clone().requires_grad_() for t in before)
    for _ in range(3):
        slopes = torch.autograd.grad(cross_entropy(heads.logits(Head(a, b, 1.5), seen), seen.targets), (a, b))
        a, b = ((t - 0.1 * s).detach().requires_grad_() for t, s in zip((a, b), slopes, strict=True))
    torch.testing.assert_close(found.a, a.detach())
    torch.testing.assert_close(found.b, b.detach())
    assert not torch.equal(found.b, before[1])
    assert torch.equal(head.a, before[0])
    assert torch.equal(head.b, before[1])


def test_adaptation_is_reproducible():
    seen, head, rates = some_states(0), some_head(1), Rates(lr=0.1, steps=3)
    one, two = (heads.adapt(head, seen, rates) for _ in range(2))
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)


def test_outer_gradient_equals_a_manual_first_order_gradient(parts):
    """The gradient of the query loss at the end of the inner loop, applied to its starting point."""
    model, tasks = parts
    rates, task = Rates(lr=0.2, steps=2), tasks[0]
    model.zero_grad()
    anil.outer_loss(model, anil.choose(tasks, [0]), rates)[0].backward()
    with torch.no_grad():
        given, _ = states(model.lm, task.support)
    a, b = (t.detach().clone().requires_grad_() for t in (model.head_a, model.head_b))
    here = a, b
    for _ in range(rates.steps):
        slopes = torch.autograd.grad(cross_entropy(heads.logits(Head(*here, model.scale), given), given.targets), here)
        here = tuple((t - rates.lr * s).detach().requires_grad_() for t, s in zip(here, slopes, strict=True))
    body = weights_of(model.lm)
    query_states, _ = states(model.lm, task.query)
    loss = cross_entropy(heads.logits(Head(*here, model.scale), query_states), query_states.targets)
    expected = torch.autograd.grad(loss, [*here, *body.values()])
    found = [model.head_a.grad, model.head_b.grad, *(weight.grad for weight in body.values())]
    assert any(g.abs().max() > 1e-3 for g in found[2:])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_fomaml_on_a_toy_model_equals_the_manual_gradient(parts):
    model, tasks = parts
    rates, task = Rates(lr=0.05, steps=2), tasks[1]
    weights = weights_of(model.lm)
    model.zero_grad()
    anil.outer_loss(model.lm, anil.choose(tasks, [1]), rates)[0].backward()
    found = [weight.grad.clone() for weight in weights.values()]
    start = [weight.detach().clone() for weight in weights.values()]
    for _ in range(rates.steps):  # the same on the module's own weights
        slopes = torch.autograd.grad(nats(model.lm, task.support), list(weights.values()))
        for weight, slope in zip(weights.values(), slopes, strict=True):
            weight.data.sub_(rates.lr * slope)
    expected = torch.autograd.grad(nats(model.lm, task.query), list(weights.values()))
    for weight, value in zip(weights.values(), start, strict=True):
        weight.data.copy_(value)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def nats(lm, shots):
    seen, _ = states(lm, shots)
    return cross_entropy(seen.base, seen.targets)


def test_fomaml_does_not_change_the_weights_of_the_model(parts):
    model, tasks = parts
    before = {name: w.detach().clone() for name, w in weights_of(model.lm).items()}
    fast = adapt_weights(model.lm, weights_of(model.lm), tasks[0].support, Rates(lr=0.1, steps=2))
    assert any(not torch.equal(fast[name], w) for name, w in before.items())
    assert all(torch.equal(weights_of(model.lm)[name], w) for name, w in before.items())


def test_episodes_of_a_batch_are_independent(parts):
    """No episode uses the support set of another."""
    model, tasks = parts
    for learner in (model, model.lm):
        with torch.no_grad():
            together = anil.adapted(learner, anil.choose(tasks, [0, 1, 2]), Rates(lr=0.1, steps=2))
            alone = [anil.adapted(learner, anil.choose(tasks, [i]), Rates(lr=0.1, steps=2)) for i in range(3)]
        torch.testing.assert_close(together[0], torch.cat([logits for logits, _, _ in alone]), atol=1e-4, rtol=1e-4)
        assert together[1].tolist() == [t for _, targets, _ in alone for t in targets.tolist()]
        starts = [0, len(tasks[0].query), len(tasks[0].query) + len(tasks[1].query)]
        assert together[2].tolist() == [
            r + s for (_, _, row), s in zip(alone, starts, strict=True) for r in row.tolist()
        ]


def test_exact_match_equals_greedy_decoding(inputs):
    base = inputs["model"].path
    model, tokenizer = load(base).eval(), HFTokenizer.load(base)
    question = episodes.example("3 go", "")
    prompt = tokenizer.chat(question.messages)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        right = Row(tuple(ids), len(prompt))
        wrong = Row((*ids[:-1], (ids[-1] + 1) % 500), len(prompt))
        seen, row = states(model, [right, wrong])
    assert exact(seen.base, seen.targets, row, 2).tolist() == [True, False]


def test_default_rates_hardly_change_logits_and_larger_ones_do(inputs, tmp_path):
    metrics = anil.run(anil.Config(**{**SMALL, "head_rank": 16}), inputs, tmp_path, context())
    moved = metrics["largest_logit_change"]
    assert 0 < moved["v2"] < 2.5e-4
    assert moved["5e-3 x 3"] > 100 * moved["v2"]
    assert moved["0.05"] > 1000 * moved["v2"]


def test_preset_has_the_default_rates_and_a_recipe_can_change_one():
    config = anil.Config(preset="v2", loop={"steps": 50})
    assert (config.lora.rank, config.lora.alpha, config.head_rank, config.head_alpha) == (16, 32, 16, 32)
    assert (config.inner, config.support, config.query) == (Rates(lr=1e-5, steps=1), 4, 4)
    loop = config.loop
    assert (loop.lr, loop.batch // loop.accumulate, loop.accumulate, loop.clip, loop.steps) == (3e-6, 2, 8, 0.5, 50)
    fomaml = anil.Config(preset="fomaml")
    assert (fomaml.method, fomaml.lora.rank, fomaml.lora.targets) == ("fomaml", 48, ("q_proj", "v_proj"))
    assert (fomaml.inner.steps, fomaml.support, fomaml.query) == (3, 8, 12)
    assert anil.Config(loop={"steps": 50}).loop == anil.Config().loop.model_copy(update={"steps": 50})
    with pytest.raises(ValidationError, match="preset"):
        anil.Config(preset="v3")


@pytest.mark.parametrize("method", ["anil", "plain", "fomaml"])
def test_each_method_writes_the_files_that_later_stages_read(inputs, tmp_path, method):
    metrics = anil.run(anil.Config(**SMALL, method=method), inputs, tmp_path, context())
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert metrics["base_sha256"] == sha256(inputs["model"].path / "model.safetensors")
    assert all(math.isfinite(figures["loss"]) for _, figures in metrics["curve"]["selection"])
    path = tmp_path / heads.FILE
    assert path.exists() == (method != "fomaml")
    if path.exists():
        head, rates, base = heads.load(path)
        assert head.a.shape == (4, 32)
        assert head.b.abs().max() > 0
        assert (head.scale, rates, base) == (8.0, Rates(lr=0.1, steps=2), metrics["base_sha256"])


def test_meta_training_improves_adaptation(inputs, tmp_path):
    loop = {**LOOP, "steps": 60, "batch": 8, "evaluate_every": 20, "lr": 0.01}
    config = anil.Config(**{**SMALL, "inner": {"lr": 0.3, "steps": 3}, "head_rank": 8, "loop": loop})
    curve = anil.run(config, inputs, tmp_path, context())["curve"]
    best = min((figures for _, figures in curve["selection"]), key=lambda figures: figures["loss"])
    assert best["loss"] < curve["selection"][0][1]["loss"] / 2
    assert best["exact"] > 0.6  # two unseen words: a model that knows both but not the rule gets 0.5


RESUMABLE = """
import sys
from pathlib import Path
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.train import anil
config, base, episodes, out = sys.argv[1:]
inputs = {"model": Artifact("x", Path(base), "0"), "episodes": Artifact("x", Path(episodes), "0")}
progress = lambda done, total, figures: print(done, flush=True)
anil.run(anil.Config.model_validate_json(config), inputs, Path(out), Context(3, 1, Path(), progress))
"""


def test_killed_and_resumed_gives_the_same_bytes(inputs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    loop = {**LOOP, "steps": 12, "evaluate_every": 6, "checkpoint_every": 3}
    config = anil.Config(**{**SMALL, "loop": loop})
    paths = inputs["model"].path, inputs["episodes"].path, killed
    command = [sys.executable, "-c", RESUMABLE, config.model_dump_json(), *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 8:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert not (killed / heads.FILE).exists()
    steps = []
    anil.run(config, inputs, killed, context(progress=lambda done, total, figures: steps.append(done)))
    anil.run(config, inputs, whole, context())
    assert steps[0] > 3  # it resumed from its checkpoint
    for name in (heads.FILE, "adapter_model.safetensors"):
        assert sha256(killed / name) == sha256(whole / name)


def test_episode_longer_than_the_context_is_refused_by_name(inputs):
    tokenizer = HFTokenizer.load(inputs["model"].path)
    long = episodes.example("word " * 60, "a")
    with pytest.raises(DataError, match=rf"example {long.id} with 0 examples before it has \d+ tokens, .* 64"):
        example_row(long, tokenizer, 64)
    short = episodes.example("3 go", "a")
    with pytest.raises(DataError, match="with 9 examples before it has"):
        example_row(short, tokenizer, 64, [short] * 9)


def test_non_finite_loss_error_contains_step_and_episode(inputs, tmp_path):
    config = anil.Config(**{**SMALL, "inner": {"lr": 1e30, "steps": 4}})
    with pytest.raises(TrainingError, match=r"nan at step 0 on train/\d+/0"):
        anil.run(config, inputs, tmp_path, context())


def test_invalid_head_file_is_refused(tmp_path):
    (tmp_path / heads.FILE).write_bytes(b"\x07" * 40)
    with pytest.raises(ArtifactError, match=r"is not an adaptable head .*; rerun the step that makes it"):
        heads.load(tmp_path / heads.FILE)
    heads.save(some_head(0), Rates(lr=0.25, steps=2), "abc", tmp_path / heads.FILE)
    head, rates, base = heads.load(tmp_path / heads.FILE)
    assert torch.equal(head.b, some_head(0).b)
    assert (head.scale, rates, base) == (1.5, Rates(lr=0.25, steps=2), "abc")
