"""A threshold with a guarantee: of accepted answers at most `risk` are wrong, with confidence 95% (SPEC F4).

Fixed-sequence testing (Angelopoulos et al. 2021, "Learn then Test") with the exact binomial bound of
Clopper and Pearson (1934). Each threshold names one whole policy of the cascade; its hypothesis "more than
`risk` of what it accepts is wrong" is rejected if the upper bound of the error rate lies at or under
`risk`. Thresholds are tested in an order fixed by other data (from the best supported one downwards) and
testing stops at the first failure, so the chance that any accepted threshold breaks the promise is at most
1 - confidence, without dividing it among the tests.

Assumption: questions asked later are exchangeable with the rows of the threshold split (same kinds of
questions, answered the same way, greedily). Different questions or sampling void the promise, not the
calibration's usefulness.
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
    steps = np.arange(1, k + 1)  # each term of the sum is the one before times (n - i + 1) p / (i (1 - p))
    ratios = np.log((n - steps + 1) / steps) + (math.log(p) - math.log1p(-p))
    logs = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(ratios)])
    return min(1.0, float(np.exp(logs).sum()))


def upper_bound(wrong: int, n: int, confidence: float) -> float:
    """Exact one-sided upper confidence bound of an error rate after `wrong` errors in `n` trials; 1 without
    trials.
    """
    if wrong >= n:
        return 1.0
    low, high = wrong / n, 1.0
    for _ in range(45):  # bisection; `high` stays on the safe side
        middle = (low + high) / 2
        if binomial_cdf(wrong, n, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What was promised and on what evidence. `threshold` is infinite if no threshold can keep the promise.

    `accepted` of `n` rows were accepted, non-abstaining answers, `wrong` of them wrong; `bound` is the
    upper bound of their error rate at this threshold (1 where nothing is accepted).
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
        """Share of rows answered with confidence."""
        return self.accepted / max(self.n, 1)

    def to_json(self) -> dict[str, Any]:
        """JSON values; an infinite threshold is null."""
        return asdict(self) | {"threshold": self.threshold if math.isfinite(self.threshold) else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Guarantee:
        """Inverse of `to_json`."""
        return cls(**value | {"threshold": math.inf if value["threshold"] is None else value["threshold"]})


Count = Callable[[float], tuple[int, int]]
"""Threshold -> (what is counted, wrong ones among it) of a policy on some split."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `risk` of what is counted may be wrong: of accepted answers, or of questions without an answer."""

    count: Count
    risk: float

    def p_value(self, threshold: float) -> float:
        """How likely so few wrong ones were if more than `risk` of all were; 1 where nothing was counted."""
        n, wrong = self.count(threshold)
        return binomial_cdf(wrong, n, self.risk)


def sequence(limits: Sequence[Limit], grid: Sequence[float] = GRID) -> list[float]:
    """The order of tests, from data the tests do not use: from the best-supported threshold downwards.

    Starting at the highest would end the tests at once: it accepts too few rows to prove anything.
    """
    evidence = [max(limit.p_value(threshold) for limit in limits) for threshold in grid]
    return list(grid[evidence.index(min(evidence)) :])


def guarantee(order: Sequence[float], limits: Sequence[Limit], rows: int, confidence: float) -> Guarantee:
    """Test thresholds in `order` on the threshold split of `rows` rows; the last that passes is returned.

    A threshold passes if it keeps every limit with `confidence` (a test of their union needs no correction). The first
    limit is that of accepted answers, which the result tells about.
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
