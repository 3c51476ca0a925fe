"""The promise of F4: the bound is the exact one, and the promise is kept in at least 95% of repeats."""

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
    threshold_order,
    upper_bound,
)


@settings(deadline=None)
@given(st.integers(1, 3000), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_upper_bound_is_clopper_pearson(n, data, confidence):
    wrong = data.draw(st.integers(0, n))
    exact = binomtest(wrong, n, alternative="less").proportion_ci(confidence, method="exact").high
    bound = upper_bound(wrong, n, confidence)
    assert bound == pytest.approx(exact, abs=1e-9)
    assert wrong == n or binomial_cdf(wrong, n, bound) <= 1 - confidence  # never below the exact one


def test_edges():
    assert upper_bound(0, 0, 0.95) == 1.0
    assert upper_bound(5, 5, 0.95) == 1.0
    assert upper_bound(0, 58, 0.95) > 0.05 > upper_bound(0, 59, 0.95)
    assert binomial_cdf(3, 10, 0.0) == binomial_cdf(10, 10, 0.5) == 1.0
    assert binomial_cdf(3, 10, 1.0) == 0.0


def test_nothing_passes_means_nothing_is_promised():
    found = guarantee(GRID, [RiskLimit(lambda t: (100, 50), 0.05)], 100, 0.95)
    assert (found.threshold, found.accepted, found.bound) == (math.inf, 0, 1.0)
    assert Guarantee.from_json(found.to_json()) == found
    assert found.to_json()["threshold"] is None


def test_testing_stops_at_the_first_failure():
    seen = []

    def count(t):
        seen.append(t)
        return (1000, 500 if t == 0.7 else 0)

    assert guarantee([0.9, 0.8, 0.7, 0.6], [RiskLimit(count, 0.05)], 1000, 0.95).threshold == 0.8
    assert list(dict.fromkeys(seen)) == [0.9, 0.8, 0.7]


def test_the_order_starts_where_there_is_evidence():
    """The highest thresholds accept too few rows to prove anything: starting there would end the tests at
    once.
    """

    def count(t):
        return {0.99: (20, 0), 0.9: (400, 4), 0.8: (600, 60)}[t]

    assert threshold_order([RiskLimit(count, 0.05)], [0.99, 0.9, 0.8]) == [0.9, 0.8]


def world(rng, n, miscalibrated):
    """`n` answers: a score, and whether they are wrong. The score lies about the chance in the second kind
    of world.
    """
    score = 1 - rng.beta(0.4, 1.6, n)
    chance = score**1.5 * 0.97 if miscalibrated else score
    return score, rng.random(n) > chance


def counter(score, wrong):
    return lambda t: (int((score >= t).sum()), int((wrong & (score >= t)).sum()))


@pytest.mark.parametrize("miscalibrated", [False, True])
def test_the_promise_is_kept_in_95_percent_of_repeats(miscalibrated):
    rng = np.random.default_rng(7)
    true_score, true_wrong = world(rng, 400_000, miscalibrated)
    repeats, broken, promised = 200, 0, 0
    for _ in range(repeats):
        order = threshold_order([RiskLimit(counter(*world(rng, 600, miscalibrated)), 0.05)])
        found = guarantee(order, [RiskLimit(counter(*world(rng, 1500, miscalibrated)), 0.05)], 1500, 0.95)
        promised += math.isfinite(found.threshold)
        broken += math.isfinite(found.threshold) and true_wrong[true_score >= found.threshold].mean() > 0.05
    # 5% of 200 is 10; a true rate of 5% exceeds 18 with probability under 1%
    assert broken <= 18
    assert promised >= (0 if miscalibrated else repeats * 0.9)


def test_the_threshold_is_not_needlessly_high():
    """With much data the promise costs little coverage against the best threshold that keeps the risk."""
    rng = np.random.default_rng(8)
    order = threshold_order([RiskLimit(counter(*world(rng, 4000, False)), 0.05)])
    found = guarantee(order, [RiskLimit(counter(*world(rng, 20_000, False)), 0.05)], 20_000, 0.95)
    score, wrong = world(rng, 400_000, False)
    ideal = min(t for t in GRID if wrong[score >= t].mean() <= 0.05)
    assert found.coverage >= (score >= ideal).mean() - 0.08


def test_a_second_limit_may_end_the_sequence_earlier():
    few = {0.9: (500, 0), 0.8: (700, 5), 0.7: (900, 10)}
    without = {0.9: (400, 0), 0.8: (400, 2), 0.7: (400, 60)}
    limits = [RiskLimit(few.__getitem__, 0.05), RiskLimit(without.__getitem__, 0.02)]
    assert guarantee([0.9, 0.8, 0.7], limits[:1], 1000, 0.95).threshold == 0.7
    found = guarantee([0.9, 0.8, 0.7], limits, 1000, 0.95)
    assert (found.threshold, found.accepted, found.wrong, found.risk) == (0.8, 700, 5, 0.05)
    assert guarantee([0.7, 0.9], limits, 1000, 0.95).threshold == float("inf")
    assert threshold_order(limits, [0.9, 0.8, 0.7]) == [0.9, 0.8, 0.7]
