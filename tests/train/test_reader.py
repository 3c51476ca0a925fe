"""Heads on hidden states: they find what is there, and say so on rows they were not fitted on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.bundle.format import DIFFICULTY, ROUTER
from cogumi.confidence.nets import load_head, load_net, load_scope
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import split_path, write_examples
from cogumi.data.responses import READINGS, Readings, Response, write_readings, write_responses
from cogumi.train import reader

WIDTH = 24


def artifacts(root, n, domains, right):
    """Readings whose states hold the domain and whether the answer is right, under noise."""
    draw = np.random.default_rng(3)
    directions = draw.normal(size=(len(set(domains)) + 1, WIDTH))
    names = sorted(set(domains))
    states = draw.normal(size=(n, WIDTH)) + np.array([directions[names.index(d)] * 2 for d in domains])
    last = states + np.outer(np.array(right) * 2.0 - 1, directions[-1])
    examples = [Example(f"e{i}", d, 0, (Message("user", f"q{i}"),), "a") for i, d in enumerate(domains)]
    write_examples(split_path(root / "data", "train"), examples)
    (root / "answers").mkdir(parents=True)
    write_responses(
        root / "answers", [Response(f"e{i}", "a", bool(ok), "", 1.0, 1, True) for i, ok in enumerate(right)]
    )
    write_readings(root / "answers" / READINGS, Readings(last.astype(np.float32), states.astype(np.float32)))
    return {
        "examples": Artifact("examples", root / "data", "data"),
        "responses": Artifact("responses", root / "answers", "answers"),
    }, (last, states)


def read(inputs, out):
    out.mkdir()
    return reader.run(reader.Config(), inputs, out, Context(0, 1, out, lambda *_: None))


def test_heads_separate_domains_and_right_from_wrong(tmp_path):
    n = 300
    domains = [("code", "math", "tools")[i % 3] for i in range(n)]
    right = [(i // 3) % 2 == 0 for i in range(n)]
    inputs, (last, mean) = artifacts(tmp_path, n, domains, right)
    metrics = read(inputs, tmp_path / "out")
    assert metrics["accuracy"] > 0.95
    assert metrics["difficulty_auroc"] > 0.9
    router, head = load_net(tmp_path / "out" / ROUTER), load_head(tmp_path / "out" / DIFFICULTY)
    assert router.classes == ("code", "math", "tools")
    assert 0 < load_scope(tmp_path / "out" / ROUTER) < 1
    found = [router.probabilities(np.concatenate([m, z])) for m, z in zip(mean, last, strict=True)]
    assert np.mean([max(p, key=p.get) == d for p, d in zip(found, domains, strict=True)]) > 0.95
    logits = head.logits(last)[:, 0]
    assert logits[np.array(right)].mean() > logits[~np.array(right)].mean() + 1


def test_states_without_information_give_no_auroc_above_chance(tmp_path):
    """Out-of-fold figures: 24 weights fitted to 60 rows of noise would separate their own rows."""
    draw = np.random.default_rng(5)
    right = draw.random(60) < 0.5
    _, _, auroc = reader.difficulty_head(draw.normal(size=(60, WIDTH)), right.astype(float))
    assert auroc < 0.7


@pytest.mark.parametrize("ok", [True, False])
def test_a_base_that_is_always_right_or_wrong_gets_a_constant_head(tmp_path, ok):
    inputs, (last, _) = artifacts(tmp_path, 40, ["one"] * 40, [ok] * 40)
    metrics = read(inputs, tmp_path / "out")
    assert metrics["difficulty_auroc"] is None
    assert metrics["classes"] == ["one"]
    logits = load_head(tmp_path / "out" / DIFFICULTY).logits(last)[:, 0]
    assert np.ptp(logits) == 0
    assert (logits[0] > 0) == ok
    assert load_net(tmp_path / "out" / ROUTER).probabilities(np.zeros(2 * WIDTH)) == {"one": 1.0}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=8, max_size=40).filter(lambda x: len(set(x)) > 1))
def test_any_mixture_of_domains_can_be_fitted(labels):
    x = np.random.default_rng(0).normal(size=(len(labels), 3))
    net, outside = reader.fit(x, labels)
    assert net.classes == tuple(sorted(set(labels)))
    assert outside.shape == (len(labels), len(set(labels)))
    assert np.isfinite(outside).all()
