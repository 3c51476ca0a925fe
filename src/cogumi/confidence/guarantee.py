"""A threshold with a guarantee: at most `risk` of the accepted answers are wrong, with confidence 95% (SPEC F4).

Fixed-sequence testing (Angelopoulos et al. 2021, "Learn then Test") with the exact binomial bound of
Clopper and Pearson (1934). Each threshold stands for the whole policy of the cascade; the null hypothesis "more than
`risk` of the accepted answers are wrong" is rejected if the upper bound of the error rate is at most `risk`.
Thresholds are tested in an order fixed on other data (from the best supported one downwards) and testing stops at the
first failure, so the probability that any passed threshold violates the guarantee is at most 1 - confidence, without
a correction for multiple tests.

Assumption: later questions are exchangeable with the rows of the threshold split (same kinds of questions, answered
the same way, greedily). With other questions or with sampling the guarantee does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

ASSUMPTION = "questions exchangeable with the rows of the threshold split, answered greedily by this bundle"
GRID = tuple(i / 200 for i in range(199, 39, -1))  # 0.995, 0.990, ..., 0.200


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p)."""
    if p <= 0.0 or k >= n:
        return 1.0
    if p >= 1.0:
        return 0.0
    steps = np.arange(1, k + 1)  # term i = term (i - 1) times (n - i + 1) p / (i (1 - p))
    ratios = np.log((n - steps + 1) / steps) + (math.log(p) - math.log1p(-p))
    logs = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(1.0, float(np.exp(logs).sum()))


def upper_bound(wrong: int, n: int, confidence: float) -> float:
    """Exact one-sided upper confidence bound of an error rate after `wrong` errors in `n` trials; 1 for n = 0."""
    if wrong >= n:
        return 1.0
    low, high = wrong / n, 1.0
    for _ in range(45):  # bisection; `high` is always a valid bound
        middle = (low + high) / 2
        if binomial_cdf(wrong, n, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A certified threshold and its evidence. `threshold` is infinite if no threshold passed.

    `accepted` of `n` rows were accepted, non-abstaining answers, `wrong` of them wrong; `bound` is the
    upper bound of their error rate at this threshold (1 if no answer is accepted).
    """

    threshold: float
    risk: float
    confidence: float
    n: int
    accepted: int
    wrong: int
    bound: float
    assumption: str = ASSUMPTION

    @property
    def coverage(self) -> float:
        """Share of rows with an accepted answer."""
        return self.accepted / max(self.n, 1)

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite threshold is null."""
        return asdict(self) | {"threshold": self.threshold if math.isfinite(self.threshold) else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Guarantee:
        """Inverse of `to_json`."""
        return cls(**value | {"threshold": math.inf if value["threshold"] is None else value["threshold"]})


Count = Callable[[float], tuple[int, int]]
"""Threshold -> (counted rows, wrong rows among them) of a policy on some split."""


@dataclass(frozen=True, slots=True)
class RiskLimit:
    """At most `risk` of the counted rows (accepted answers, or unanswerable questions) may be wrong."""

    count: Count
    risk: float

    def p_value(self, threshold: float) -> float:
        """P(at most this many wrong rows) if the error rate were `risk`; 1 without counted rows."""
        n, wrong = self.count(threshold)
        return binomial_cdf(wrong, n, self.risk)


def threshold_order(limits: Sequence[RiskLimit], grid: Sequence[float] = GRID) -> list[float]:
    """The order in which thresholds are tested: from the best-supported one downwards, chosen on separate data.

    Starting at the highest threshold would fail at once: it accepts too few rows for a significant test.
    """
    evidence = [max(limit.p_value(threshold) for limit in limits) for threshold in grid]
    return list(grid[evidence.index(min(evidence)) :])


def guarantee(order: Sequence[float], limits: Sequence[RiskLimit], rows: int, confidence: float) -> Guarantee:
    """Test thresholds in `order` on the threshold split of `rows` rows; returns the last one that passes.

    A threshold passes if it meets every limit with `confidence` (an intersection-union test needs no correction). The
    first limit must be that of accepted answers; the result reports its counts.
    """
    count, risk = limits[0].count, limits[0].risk
    passed = None
    for threshold in order:
        accepted, wrong = count(threshold)
        if any(limit.p_value(threshold) > 1.0 - confidence for limit in limits):  # as upper_bound(...) > risk
            break
        passed = threshold, accepted, wrong
    if passed is None:
        return Guarantee(math.inf, risk, confidence, rows, 0, 0, 1.0)
    threshold, accepted, wrong = passed
    bound = upper_bound(wrong, accepted, confidence)
    return Guarantee(threshold, risk, confidence, rows, accepted, wrong, bound)
