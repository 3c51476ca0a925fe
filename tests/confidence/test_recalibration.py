"""Recalibration from votes (SPEC F16, F17): influence per user, certification before use, fixed risk limit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.confidence import personal
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import (
    CANARY,
    MAX_SHIFT,
    Correction,
    Vote,
    Votes,
    cap_below_thresholds,
    certified,
    cusum_harm,
    features,
    fit_correction,
    gain,
    in_canary,
    learn,
    logit,
    trust,
    weights,
)
from support.votes import CANARIES, DOMAINS, PROMISE, votes_of

# Correction


@given(st.floats(0, 1), st.dictionaries(st.sampled_from(["domain_a", "x"]), st.floats(-1e6, 1e6)))
def test_an_empty_layer_changes_nothing(p, seen):
    assert Correction().p_correct(p, seen, ()) == pytest.approx(p, abs=1e-3)


LAYERS = st.builds(
    Correction,
    st.floats(-9, 9),
    st.floats(-3, 3),
    st.dictionaries(st.sampled_from(["domain_a", "mean_logprob"]), st.tuples(st.floats(-9, 9), st.floats(-9, 9))),
)


@given(LAYERS, st.floats(0, 1), st.dictionaries(st.sampled_from(["domain_a", "b"]), st.floats(-1e9, 1e9)))
def test_uncertified_layer_never_raises_an_answer_above_a_threshold(layer, p, seen):
    thresholds = (0.3, 0.9)
    q = layer.p_correct(p, seen, thresholds)
    assert 0.0 <= q <= 1.0
    assert all(p >= t for t in thresholds if q >= t)
    assert abs(logit(q) - logit(p)) <= MAX_SHIFT + 1e-6


@given(LAYERS, st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_vectorized_correction_equals_single_corrections(layer, ps):
    votes = Votes.of(Vote(str(i), "u", str(i), p, {"domain_a": i / 3}, True) for i, p in enumerate(ps))
    alone = [layer.p_correct(row.p, row.features, (0.5,)) for row in votes.rows]
    np.testing.assert_array_equal(layer.p_all(votes, (0.5,)), alone)


def test_hold_keeps_values_just_below_the_threshold():
    held = cap_below_thresholds([0.2, 0.5, 0.95, 0.2], [0.95, 0.95, 0.99, 0.4], (0.5, 0.9))
    assert held[0] < 0.5 <= held[1] < 0.9
    np.testing.assert_allclose(held, [0.5, 0.9, 0.99, 0.4])


def test_features_omit_non_finite_values():
    signals = {"domain_math": 0.5, "mean_logprob": math.nan, "log_length": math.inf, "base_p": 0.3, "min_margin": 1.0}
    assert features(signals) == {"domain_math": 0.5, "modifier": 1.0}


def test_fit_corrects_only_the_domain_that_got_worse():
    rng = np.random.default_rng(0)
    votes = Votes.of(votes_of(rng, 12_000, shift=(0.0, -1.5)))
    layer, _ = learn(votes, half_life=1e9)
    for domain, expected in zip(DOMAINS, (0.0, -1.5), strict=True):
        moved = logit(layer.p_correct(0.7, {domain: 1.0}, ())) - logit(0.7)
        assert moved == pytest.approx(expected, abs=0.2)


def test_fit_without_votes_or_drift_changes_little():
    rng = np.random.default_rng(1)
    for n, most in ((0, 1e-9), (20, 0.1), (10_000, 0.1)):
        votes = Votes.of(votes_of(rng, n))
        layer = fit_correction(votes, weights(votes, {}))
        assert max(abs(layer.offset), abs(layer.slope), *(abs(w) for w, _ in layer.terms.values()), 0) <= most


# Bounded influence


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60),
    st.dictionaries(st.sampled_from("01234"), st.floats(0, 1)),
)
def test_weight_of_a_user_and_of_an_answer_is_capped(pairs, trusted):
    votes = Votes.of(Vote(str(i), str(u), str(a), 0.5, {}, True) for i, (u, a) in enumerate(pairs))
    w = weights(votes, trusted)
    assert ((w >= 0) & (w <= 1)).all()
    for group in (votes.user, votes.answer):
        assert np.bincount(group, w).max(initial=0.0) <= max(1.0, 0.005 * len(votes)) + 1e-9


def test_later_vote_on_an_answer_replaces_the_earlier_one():
    rows = [Vote("a", "u", "x", 0.5, {}, True), Vote("b", "u", "y", 0.5, {}, True), Vote("a", "u", "x", 0.5, {}, False)]
    votes = Votes.of([*rows, Vote("c", "u", "z", math.nan, {}, True)])
    assert [(row.id, row.right) for row in votes.rows] == [("b", True), ("a", False)]


def test_constant_and_contrarian_voters_get_no_weight():
    rng = np.random.default_rng(2)
    honest = votes_of(rng, 8_000)
    lazy = [Vote(v.id, f"lazy{i % 4}", v.answer, v.p, v.features, True) for i, v in enumerate(votes_of(rng, 400))]
    against = votes_of(rng, 400, users=4, name="against", flip=True)
    votes = Votes.of([*honest, *lazy, *against])
    found = trust(votes, votes.p)
    assert max(w for user, w in found.items() if user[0] in "la") == 0.0
    assert np.mean([w for user, w in found.items() if user[0] == "u"]) > 0.8


def test_thousands_of_votes_by_one_user_have_little_effect():
    rng = np.random.default_rng(3)
    honest = votes_of(rng, 10_000, shift=(0.0, -1.0))
    attack_votes = votes_of(rng, 5_000, users=1, name="villain", flip=True)
    mixed = [row for i in range(0, 10_000, 2) for row in (*honest[i : i + 2], attack_votes[i // 2])]
    test = Votes.of(votes_of(rng, 2_000))
    clean, dirty = (learn(Votes.of(rows), 5_000.0)[0].p_all(test, ()) for rows in (honest, mixed))
    assert np.abs(clean - dirty).mean() < 0.01


# Certification


def test_gain_is_the_brier_improvement_with_a_bound_clustered_by_user():
    rng = np.random.default_rng(4)
    votes = Votes.of(votes_of(rng, 4_000, shift=(-1.5, -1.5)))
    better = sigmoid(logit(votes.p) - 1.5)
    one = np.ones(len(votes))
    found = gain(votes, one, votes.p, better)
    assert found.before == pytest.approx(np.mean((votes.p - votes.right) ** 2))
    assert found.gain == pytest.approx(1 - np.mean((better - votes.right) ** 2) / found.before)
    assert 0 < found.low < found.gain
    many_users = Votes.of(Vote(r.id, "one", r.answer, r.p, r.features, r.right) for r in votes.rows[:50])
    assert gain(many_users, np.zeros(50), many_users.p, many_users.p).low <= 0


def test_noise_is_rarely_accepted_as_a_gain():
    """A candidate of pure noise: its 95% bound is above zero in about one of twenty trials."""
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(200):
        votes = Votes.of(votes_of(rng, 400))
        after = sigmoid(logit(votes.p) + rng.normal(0, 0.05))
        false += gain(votes, np.ones(400), votes.p, after).low > 0
    assert false <= 20


def test_worst_recent_stretch_ends_at_the_latest_vote():
    right = [True] * 4
    votes = Votes.of(Vote(str(i), "u", str(i), 1.0, {}, r) for i, r in enumerate(right))
    costs = np.array([0.5, -0.3, 0.2, 0.4])
    after = 1 - np.sqrt(np.maximum(costs, 0))
    before = 1 - np.sqrt(np.maximum(-costs, 0))
    assert cusum_harm(votes, np.ones(4), before, after) == pytest.approx(0.8)
    assert cusum_harm(votes, np.ones(4), after, before) == 0.0
    assert cusum_harm(Votes.of([]), np.zeros(0), np.zeros(0), np.zeros(0)) == 0.0


def test_certificate_uses_the_exact_bound_and_corrects_for_repeated_tests():
    votes = Votes.of(Vote(str(i), str(i), str(i), 0.95, {}, i >= 4) for i in range(300))
    w, q = np.ones(300), np.full(300, 0.95)
    assert certified(votes, w, q, [PROMISE], 1)  # 4 wrong of 300: 95% bound 3.0%, 97.5% bound 3.4%
    assert not certified(votes, w, q, [PROMISE], 40)
    assert not certified(votes, w / 3, q, [PROMISE], 1)  # no trusted votes
    assert not certified(votes, w, q - 0.5, [PROMISE], 1)  # nothing accepted: nothing proven
    assert certified(votes, w, q, [], 1)


def test_family_wise_error_of_certificates_is_bounded():
    """Layers above the risk limit (5.5% wrong) are certified in about 5% of sequences of ten tests."""
    rng = np.random.default_rng(6)
    failed = 0
    for _ in range(100):
        for test in range(1, 11):
            wrong = rng.random(400) < 0.055
            votes = Votes.of(Vote(str(i), str(i), str(i), 0.95, {}, not x) for i, x in enumerate(wrong))
            if certified(votes, np.ones(400), votes.p, [PROMISE], test):
                failed += 1
                break
    assert failed <= 9  # 5 expected at most, at a risk of just 5%; 9 or more happen in 7% of such cases


def test_canary_receives_a_tenth_of_the_users():
    assert np.mean([in_canary(f"turn-{i}") for i in range(20_000)]) == pytest.approx(CANARY, abs=0.01)
    assert [i for i in range(40) if in_canary(f"turn-{i}")] == CANARIES
    assert in_canary("\ud800") in (True, False)  # any text is an id


# Personal offsets


def evidence(votes, a=(0.0, 1.0), b=(0.0, 1.0)):
    return personal.Evidence(votes, {"domain_a": a, "domain_b": b})


def test_personal_offsets_need_fifty_votes_and_significance():
    assert personal.offsets(evidence(49, (-20.0, 5.0), (-20.0, 5.0))) == {}
    assert personal.offsets(evidence(50, (1.0, 5.0), (-1.0, 5.0))) == {"domain_a": 0.0, "domain_b": 0.0}
    both = personal.offsets(evidence(50, (-20.0, 5.0), (-20.0, 5.0)))
    assert all(-1.0 <= x < -0.5 for x in both.values())
    one = personal.offsets(evidence(200, (-20.0, 15.0), (0.0, 15.0)))
    assert one["domain_a"] < one["domain_b"] <= 0.0


EVIDENCE = st.builds(evidence, st.integers(50, 500), *[st.tuples(st.floats(-500, 500), st.floats(0, 100))] * 2)


@given(EVIDENCE, st.lists(EVIDENCE, max_size=4))
def test_personal_offsets_are_bounded(own, others):
    assert all(abs(x) <= personal.MAX_OFFSET for x in personal.offsets(own, others).values())


def test_neighbours_affect_only_users_who_differ():
    alike = [evidence(300, (-30.0, 30.0), (0.0, 30.0)) for _ in range(5)]
    differing = evidence(60, (-8.0, 5.0), (0.5, 5.0))
    assert personal.offsets(differing, alike)["domain_a"] < personal.offsets(differing)["domain_a"]
    usual = evidence(60, (-2.0, 5.0), (0.1, 5.0))
    assert personal.offsets(usual, alike) == personal.offsets(usual)


@given(st.dictionaries(st.sampled_from(["domain_a", "domain_b", "x"]), st.floats(-1, 1)))
def test_shares_sum_to_one(seen):
    assert sum(personal.domain_shares(seen).values()) == pytest.approx(1.0)
