"""`confidence.reuse`: conflicts between similar questions, and the verifier that bounds false reuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.confidence.reuse import FEATURES, conflict, pair_features
from cogumi.confidence.verified_reuse import Verifier, proven_threshold

CONFLICTS = [
    ("numbers", "Who won in 1998?", "Who won in 1999?"),
    ("numbers", "What is 7 minus 5?", "What is 5 minus 7?"),
    ("numbers", "List three causes", "List four causes"),
    ("symbols", "What is 7 + 5?", "What is 7 * 5?"),
    ("symbols", "What is 7 - 5?", "What is 7 / 5?"),
    ("names", "What is the capital of Austria?", "What is the capital of Australia?"),
    ("names", 'What does "affect" mean?', 'What does "effect" mean?'),
    ("names", "Is vitamin c good?", "Is vitamin d good?"),
    ("names", "Does it concern US?", "Does it concern us?"),
    ("negation", "Which birds can fly?", "Which birds can't fly?"),
    ("negation", "How to live with pain?", "How to live without pain?"),
    ("question", "When did he die?", "Why did he die?"),
    ("question", "How much is it?", "How far is it?"),
    ("question", "Can you wash boots?", "How do you wash boots?"),
    ("order", "How do I convert dollars to euros?", "How do I convert euros to dollars?"),
    ("opposites", "How to increase weight?", "How to decrease weight?"),
    ("code", "what does f(x) do", "what does g(x) do"),
]


@pytest.mark.parametrize(("kind", "one", "other"), CONFLICTS)
def test_conflicting_questions_are_not_reused(kind, one, other):
    assert conflict(one, other).startswith(kind)
    assert conflict(other, one).startswith(kind)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the capital of France?", "What is the capital of france"),
        ("How can I lose weight quickly?", "What is the best way to quickly lose weight?"),
        ("Tell me the rules of chess.", "What are the rules of chess?"),
        ("How many legs do 2 spiders have?", "How many legs have two spiders?"),
        ("What will Trump do?", "what will trump do?"),
    ],
)
def test_rephrased_questions_do_not_conflict(one, other):
    assert conflict(one, other) is None


text = st.text(st.characters(codec=None), max_size=60)


@given(text, text)
def test_conflict_check_accepts_any_text(one, other):
    found = pair_features(one, other, 0.5)
    assert found.shape == (len(FEATURES),)
    assert np.isfinite(found).all()
    assert conflict(one, one) is None
    assert (conflict(one, other) is None) == (conflict(other, one) is None)


def stream(n, seed, noise):
    """Synthetic entries, each with its own similarity level above which reuse is correct."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(0.0, 1.0, 40)
    for _ in range(n):
        entry = int(rng.integers(40))
        score = float(rng.normal(0.0, 2.0))
        yield entry, score, bool(rng.random() < 1 / (1 + np.exp(-noise * (score - levels[entry] - 1))))


@pytest.mark.parametrize("seed", range(3))
def test_share_of_false_hits_stays_below_the_bound(seed):
    verifier, own, hits, wrong = Verifier(0.05), {}, 0, 0
    for entry, score, right in stream(4000, seed, 4.0):
        bound = verifier.bound(score, own.get(entry, []))
        if verifier.trusts(bound):
            hits, wrong = hits + 1, wrong + (not right)
        if not verifier.trusts(bound) or hits % 20 == 0:
            verifier.learn(score, bound, right)
            own.setdefault(entry, []).append((score, right))
    assert hits > 500
    assert wrong / hits <= 0.05


def test_unproven_entries_are_not_reused():
    verifier = Verifier(0.01)
    for entry, score, right in stream(2000, 9, 0.2):
        verifier.learn(score, verifier.bound(score, []), right)
        assert not verifier.trusts(verifier.bound(score, [])), entry


def test_proven_is_consistent_between_counts_and_bounds():
    assert proven_threshold([(0.9, True)] * 298, 0.01) == np.inf
    assert proven_threshold([(0.9, True)] * 299, 0.01) == 0.9
    assert proven_threshold([(0.9, True)] * 299 + [(0.9, False)] * 5, 0.01) == np.inf
    assert proven_threshold([(0.9, True)] * 299 + [(0.5, False)] * 300, 0.01) == 0.9
    assert proven_threshold([], 0.01) == np.inf
