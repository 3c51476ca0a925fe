"""`confidence.guarantee` (SPEC F4): the exact upper bound, and a risk limit that holds in at least 95% of repeats."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from cogumi.confidence.guarantee import (
    GRID,
    Guarantee,
    RiskLimit,
    binomial_cdf,
    guarantee,
    least_trials,
    percent,
    threshold_order,
    trials_needed,
    upper_bound,
)


@settings(deadline=None)
@given(st.integers(1, 3000), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_upper_bound_is_clopper_pearson(n, data, confidence):
    wrong = data.draw(st.integers(0, n))
    exact = binomtest(wrong, n, alternative="less").proportion_ci(confidence, method="exact").high
    bound = upper_bound(wrong, n, confidence)
    assert bound == pytest.approx(exact, abs=1e-9)
    assert wrong == n or binomial_cdf(wrong, n, bound) <= 1 - confidence  # never below the exact bound


def test_upper_bound_at_the_extremes():
    assert upper_bound(0, 0, 0.95) == 1.0
    assert upper_bound(5, 5, 0.95) == 1.0
    assert upper_bound(0, 58, 0.95) > 0.05 > upper_bound(0, 59, 0.95)
    assert binomial_cdf(3, 10, 0.0) == binomial_cdf(10, 10, 0.5) == 1.0
    assert binomial_cdf(3, 10, 1.0) == 0.0


def test_no_threshold_is_returned_when_none_passes():
    found = guarantee(GRID, [RiskLimit(lambda t: (100, 50), 0.05)], 100, 0.95)
    assert (found.threshold, found.accepted, found.bound) == (math.inf, 0, 1.0)
    assert Guarantee.from_json(found.to_json()) == found
    assert found.to_json()["threshold"] is None


def test_sequence_stops_at_the_first_failure():
    seen = []

    def count(t):
        seen.append(t)
        return (1000, 500 if t == 0.7 else 0)

    assert guarantee([0.9, 0.8, 0.7, 0.6], [RiskLimit(count, 0.05)], 1000, 0.95).threshold == 0.8
    assert list(dict.fromkeys(seen)) == [0.9, 0.8, 0.7]


def test_sequence_starts_at_a_threshold_with_enough_rows():
    """The highest thresholds accept too few rows for a proof: starting there would end the sequence at once."""

    def count(t):
        return {0.99: (20, 0), 0.9: (400, 4), 0.8: (600, 60)}[t]

    assert threshold_order([RiskLimit(count, 0.05)], 1.0, 0.95, [0.99, 0.9, 0.8]) == [0.9, 0.8]


@pytest.mark.parametrize(("scale", "first"), [(1.0, 0.8), (3.0, 0.9), (8.0, 0.99)])
def test_testing_starts_where_enough_answers_are_expected(scale, first):
    """The evidence is best at 0.8; three errors at 5% need 153 accepted answers."""
    counts = {0.99: (20, 0), 0.9: (60, 1), 0.8: (120, 2), 0.7: (200, 15)}
    limits = [RiskLimit(counts.__getitem__, 0.05)]
    assert least_trials(3, 0.05, 0.95) == 153
    assert threshold_order(limits, scale, 0.95, list(counts))[0] == first


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.sampled_from([0.01, 0.05, 0.2]))
def test_least_trials_prove_the_risk_and_one_fewer_does_not(errors, risk):
    trials = least_trials(errors, risk, 0.95)
    assert upper_bound(errors, trials, 0.95) <= risk + 1e-9 < upper_bound(errors, trials - 1, 0.95)


def test_no_threshold_that_keeps_the_limit_is_reported_as_missed():
    """Testing began at 0.8 and failed there; 0.9 would have passed."""
    counts = {0.9: (230, 3), 0.8: (400, 22)}
    found = guarantee([0.8], [RiskLimit(lambda t: counts.get(t, (0, 0)), 0.05)], 800, 0.95)
    assert found.missed is not None
    assert (found.missed.threshold, found.missed.bound > 0.05) == (0.8, True)
    assert "which proves at most 7.8%, not 5%" in found.sentence()


def test_a_limit_that_no_threshold_meets_does_not_hide_the_other():
    """60 unanswerable rows prove nothing at 2%; the start is then chosen by the accepted answers."""
    limits = [RiskLimit({0.99: (20, 0), 0.9: (400, 4)}.get, 0.05), RiskLimit(lambda t: (60, 0), 0.02, True)]
    assert threshold_order(limits, 1.0, 0.95, [0.99, 0.9]) == [0.9]


def answers(rng, n, miscalibrated):
    """`n` answers: their scores, and whether they are wrong. A miscalibrated score misstates P(correct)."""
    score = 1 - rng.beta(0.4, 1.6, n)
    chance = score**1.5 * 0.97 if miscalibrated else score
    return score, rng.random(n) > chance


def counter(score, wrong):
    return lambda t: (int((score >= t).sum()), int((wrong & (score >= t)).sum()))


@pytest.mark.parametrize("miscalibrated", [False, True])
def test_risk_limit_holds_in_95_percent_of_repeats(miscalibrated):
    rng = np.random.default_rng(7)
    true_score, true_wrong = answers(rng, 400_000, miscalibrated)
    repeats, violations, guaranteed = 200, 0, 0
    for _ in range(repeats):
        order = threshold_order([RiskLimit(counter(*answers(rng, 600, miscalibrated)), 0.05)], 2.5, 0.95)
        found = guarantee(order, [RiskLimit(counter(*answers(rng, 1500, miscalibrated)), 0.05)], 1500, 0.95)
        guaranteed += math.isfinite(found.threshold)
        violations += math.isfinite(found.threshold) and true_wrong[true_score >= found.threshold].mean() > 0.05
    # 5% of 200 is 10; a true rate of 5% exceeds 18 with probability under 1%
    assert violations <= 18
    assert guaranteed >= (0 if miscalibrated else repeats * 0.9)


def test_threshold_is_close_to_the_ideal_one():
    """With much data, the guarantee costs little coverage against the best threshold within the risk limit."""
    rng = np.random.default_rng(8)
    order = threshold_order([RiskLimit(counter(*answers(rng, 4000, False)), 0.05)], 5.0, 0.95)
    found = guarantee(order, [RiskLimit(counter(*answers(rng, 20_000, False)), 0.05)], 20_000, 0.95)
    score, wrong = answers(rng, 400_000, False)
    ideal = min(t for t in GRID if wrong[score >= t].mean() <= 0.05)
    assert found.coverage >= (score >= ideal).mean() - 0.08


def test_second_limit_can_end_the_sequence_earlier():
    few = {0.9: (500, 0), 0.8: (700, 5), 0.7: (900, 10)}
    without = {0.9: (400, 0), 0.8: (400, 2), 0.7: (400, 60)}
    limits = [RiskLimit(lambda t: few.get(t, (0, 0)), 0.05), RiskLimit(lambda t: without.get(t, (0, 0)), 0.02, True)]
    assert guarantee([0.9, 0.8, 0.7], limits[:1], 1000, 0.95).threshold == 0.7
    found = guarantee([0.9, 0.8, 0.7], limits, 1000, 0.95)
    assert (found.threshold, found.accepted, found.wrong, found.risk) == (0.8, 700, 5, 0.05)
    assert guarantee([0.7, 0.9], limits, 1000, 0.95).threshold == float("inf")
    assert threshold_order(limits, 1.0, 0.95, [0.9, 0.8, 0.7]) == [0.9, 0.8, 0.7]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.data(), st.sampled_from([0.02, 0.05, 0.1]))
def test_trials_needed_is_the_least_number_that_proves_the_risk(n, data, risk):
    wrong = data.draw(st.integers(0, min(n, 12)))
    needed = trials_needed(wrong, n, risk, 0.95)
    if needed is None:
        assert wrong >= risk * n or wrong / n > 0.8 * risk
        return

    def proves(trials):
        return upper_bound(-(-wrong * trials // n), trials, 0.95) <= risk + 1e-9

    assert needed >= n
    assert proves(needed)
    assert not any(proves(trials) for trials in range(max(n, needed - 40), needed))


def test_trials_needed_for_too_many_errors():
    assert trials_needed(0, 0, 0.05, 0.95) is None
    assert trials_needed(5, 100, 0.05, 0.95) is None
    assert trials_needed(0, 10, 0.05, 0.95) == 59


def test_missed_promise_says_what_was_proved_and_how_many_rows_are_lacking():
    """63 of 352 with 1 wrong prove 7.4%; 124 with 2 wrong prove 5%, which takes 341 more rows."""
    found = guarantee(GRID, [RiskLimit(lambda t: (63, 1) if t == 0.9 else (20, 5), 0.05)], 352, 0.95)
    assert not found.certified
    assert found.sentence() == (
        "Not certified: the best threshold accepts 63 of 352 with 1 wrong, which proves at most 7.4%, not 5%. "
        "About 341 more rows in the split `threshold` would do, or allow more with `e` of the step `calibrate` "
        "(`--errors` of `adopt`)."
    )
    assert Guarantee.from_json(found.to_json()) == found
    hopeless = guarantee(GRID, [RiskLimit(lambda t: (100, 50), 0.05)], 100, 0.95).sentence()
    assert "More rows alone will not do: improve the model, or allow more with `e`" in hopeless
    assert "no threshold accepts an answer" in guarantee(GRID, [RiskLimit(lambda t: (0, 0), 0.05)], 9, 0.95).sentence()
    limits = [RiskLimit(lambda t: (500, 0), 0.05), RiskLimit(lambda t: (60, 0), 0.02, unanswerable=True)]
    refused = guarantee(GRID, limits, 600, 0.95).sentence()
    assert "accepts 0 of 60 unanswerable questions, which proves at most 4.9%, not 2%" in refused
    assert (
        "About 89 more unanswerable rows in the split `threshold` would do, or allow more with `unanswerable` of"
        in refused
    )


def test_certified_promise_shows_its_evidence():
    found = guarantee([0.87], [RiskLimit(lambda t: (120, 1), 0.05)], 352, 0.95)
    assert found.certified
    assert "The threshold 0.87 accepts 120 of 352 with 1 wrong, which proves at most 3.9%." in found.sentence()
    assert [percent(x) for x in (0.05, 0.0731, 0.1, 0.0201)] == ["5%", "7.4%", "10%", "2.1%"]
