"""Properties of sampling, token signals and text streams."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cogumi.core.errors import RequestError
from cogumi.core.types import Request
from cogumi.engine.generation import TextStream
from cogumi.engine.sampling import LogitsProcessor, check, draw, logprobs_of, probabilities, signals, top_logprobs

rows = st.lists(st.integers(-40, 40), min_size=2, max_size=40).map(lambda x: np.array(x, np.float32) / 4)


@given(rows)
@settings(deadline=None)
def test_greedy_takes_the_lowest_id_of_equal_maxima(logits):
    p = probabilities(logits, 0.0)
    assert p.sum() == 1
    assert p.argmax() == np.flatnonzero(logits == logits.max())[0]
    assert draw(p, np.random.default_rng(0)) == p.argmax()


@given(rows, st.floats(0.05, 5), st.floats(0.01, 1))
@settings(deadline=None)
def test_nucleus_is_the_smallest_set_with_its_probability_mass(logits, temperature, top_p):
    whole, p = probabilities(logits, temperature), probabilities(logits, temperature, top_p)
    assert p.sum() == pytest.approx(1)
    kept = p > 0
    mass = whole[kept].sum()
    assert mass >= top_p - 1e-9
    assert kept.sum() == 1 or mass - whole[kept].min() < top_p + 1e-9
    assert whole[kept].min() >= whole[~kept].max(initial=0)
    assert p[kept] == pytest.approx(whole[kept] / mass)


@given(rows, st.floats(0.05, 5), st.integers(1, 50), st.floats(0, 1))
@settings(deadline=None)
def test_top_k_and_min_p_keep_the_best(logits, temperature, top_k, min_p):
    whole = probabilities(logits, temperature)
    best, near = probabilities(logits, temperature, top_k=top_k), probabilities(logits, temperature, min_p=min_p)
    assert (best > 0).sum() == min(top_k, (whole > 0).sum())
    assert whole[best > 0].min() >= whole[best == 0].max(initial=0)
    assert set(np.flatnonzero(near)) == set(np.flatnonzero((whole >= min_p * whole.max()) & (whole > 0)))
    for p in (best, near):
        assert p.sum() == pytest.approx(1)
        assert p[p > 0] == pytest.approx(whole[p > 0] / whole[p > 0].sum())


def test_repetition_penalty_lowers_ids_of_prompt_and_answer():
    request = Request(prompt="x", repetition_penalty=2.0, presence_penalty=0.5)
    processor = LogitsProcessor.of(request, prompt=[1, 1], ends=[0])
    processor.accept(2)
    row = np.array([3, 4, -4, 5], np.float32)
    assert processor.apply(row).tolist() == [3, 2, -8.5, 5]
    assert row.tolist() == [3, 4, -4, 5]
    assert processor.best(row) == 3
    assert LogitsProcessor.of(replace(request, repetition_penalty=1.0, presence_penalty=0.0), [1], [0]) is None


def test_end_tokens_are_forbidden_before_min_tokens():
    processor = LogitsProcessor.of(Request(prompt="x", min_tokens=2), prompt=[], ends={0, 2})
    row, found = np.array([9, 1, 8], np.float32), []
    for _ in range(4):
        found.append(processor.best(row))
        assert processor.apply(row).argmax() == found[-1]
        processor.accept(found[-1])
    assert found == [1, 1, 0, 0]


def test_draws_follow_the_distribution():
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    p = probabilities(logits, 1.3, 0.9)
    generator = np.random.default_rng(2)
    counts = np.bincount([draw(p, generator) for _ in range(20_000)], minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 1e-4


def test_each_draw_uses_one_uniform_number():
    p = probabilities(np.zeros(7, np.float32), 1.0)
    drawn, plain = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(9):
        draw(p, drawn)
        plain.random()
    assert drawn.random() == plain.random()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 700))
@settings(deadline=None, max_examples=40)
def test_signals_equal_float64_and_do_not_depend_on_the_batch(seed, n, size):
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=6, size=(n, size)).astype(np.float32)
    chosen = generator.integers(size, size=n)
    wide = logits.astype(np.float64)
    exact = wide - np.logaddexp.reduce(wide, axis=1)[:, None]
    found = signals(logits, chosen)
    for i, (logprob, entropy, margin) in enumerate(found):
        best = np.sort(exact[i])[::-1]
        assert logprob == pytest.approx(exact[i, chosen[i]], abs=1e-4)
        assert entropy == pytest.approx(-(np.exp(exact[i]) * exact[i]).sum(), abs=1e-4)
        assert margin == pytest.approx(best[0] - best[1], abs=1e-4)
        assert signals(logits[i : i + 1], chosen[i : i + 1])[0] == found[i]
    assert logprobs_of(logits, chosen) == pytest.approx([t[0] for t in found], abs=1e-5)


@given(rows, st.integers(0, 20))
@settings(deadline=None)
def test_top_logprobs_are_sorted_and_complete(logits, n):
    top = top_logprobs(logits, n)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:n]
    assert [i for i, _ in top] == order
    assert sum(math.exp(x) for _, x in top) <= 1 + 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 2.0},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"min_tokens": -1},
        {"min_tokens": 1, "json_schema": "{}"},
        {"logprobs": 21},
        {"logprobs": -1},
        {"seed": -1},
        {"stop": ("a", "")},
        {"logit_bias": {7: "1"}},
        {"logit_bias": {7: None}},
        {"logit_bias": {7: True}},
        {"logit_bias": {7: 101}},
        {"logit_bias": {7: math.nan}},
        {"logit_bias": {"7": 1.0}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {7.0: 1.0}},
        {"logit_bias": {-1: 1.0}},
    ],
)
def test_invalid_values_are_refused_by_name(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        check(Request(prompt="x", **wrong))


def cuts(data, text):
    """The bytes of a text, split anywhere, also inside characters."""
    raw = text.encode()
    places = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    return [raw[a:b] for a, b in pairwise(places)] or [b""]


@given(
    st.data(),
    st.text(alphabet="abé🙂 ", max_size=30),
    st.lists(st.text("ab🙂 ", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None)
def test_stream_emits_exactly_the_text_before_the_first_stop_string(data, text, stop):
    stream, released = TextStream(stop), ""
    pieces = cuts(data, text)
    for i, piece in enumerate(pieces):
        released += stream.push(piece, last=i == len(pieces) - 1)
        assert not any(s in released for s in stop)
        if stream.stopped:
            break
    if stream.stopped:
        assert any(text.startswith(released + s) for s in stop)
    else:
        assert released == text
    assert stream.stopped == any(s in text for s in stop)


def test_invalid_utf8_becomes_replacement_characters():
    stream = TextStream()
    assert stream.push("🙂".encode()[:2]) == ""
    assert stream.push(b"a") == "\ufffda"


def test_character_that_the_last_token_cuts_is_dropped():
    stream = TextStream()
    assert stream.push("a🙂".encode()[:3]) == "a"
    assert stream.push("🙂".encode()[2:3], last=True) == ""
