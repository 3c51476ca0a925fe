"""A threshold with a guarantee: at most `risk` of the accepted answers are wrong, with confidence 95% (SPEC F4).

Fixed-sequence testing (Angelopoulos et al. 2021, "Learn then Test") with the exact binomial bound of
Clopper and Pearson (1934). Each threshold stands for the whole policy of the cascade; the null hypothesis "more than
`risk` of the accepted answers are wrong" is rejected if the upper bound of the error rate is at most `risk`.
Thresholds are tested in an order fixed on other data (see `threshold_order`) and testing stops at the first failure,
so the probability that any passed threshold violates the guarantee is at most 1 - confidence, without a correction for
multiple tests.

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
MOST_ERRORS = 500
"""`trials_needed` gives up after this many errors."""
TOLERATED = 3
"""Errors that the first tested threshold should tolerate; see `threshold_order`."""
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


def least_trials(errors: int, risk: float, confidence: float) -> int:
    """The least number of trials in which so many errors prove an error rate of at most `risk`."""
    short, enough = 0, errors + 1
    while binomial_cdf(errors, enough, risk) > 1.0 - confidence:
        short, enough = enough, 2 * enough
    while short + 1 < enough:
        middle = (short + enough) // 2
        if binomial_cdf(errors, middle, risk) > 1.0 - confidence:
            short = middle
        else:
            enough = middle
    return enough


def trials_needed(wrong: int, n: int, risk: float, confidence: float) -> int | None:
    """The least number of trials, at least `n`, that proves an error rate of at most `risk`, if errors stay as frequent
    as `wrong` in `n` (rounded up to whole errors). None if they are too frequent for any reasonable number.
    """
    if n == 0 or wrong >= risk * n:
        return None
    for errors in range(wrong, wrong + MOST_ERRORS):
        least = least_trials(errors, risk, confidence)
        least = max(least, n, (errors - 1) * n // wrong + 1 if wrong else 0)
        if wrong * least <= errors * n:
            return least
    return None


@dataclass(frozen=True, slots=True)
class Missed:
    """The best threshold that was not certified: `wrong` of `counted` rows prove `bound`, more than `risk`.

    Counted are accepted answers or, if `unanswerable`, unanswerable questions, where an accepted answer is wrong.
    """

    threshold: float
    counted: int
    wrong: int
    bound: float
    risk: float
    unanswerable: bool = False


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A certified threshold and its evidence; if none passed, `threshold` is infinite and `missed` is the best.

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
    missed: Missed | None = None

    @property
    def certified(self) -> bool:
        """Whether a threshold passed."""
        return math.isfinite(self.threshold)

    def sentence(self) -> str:
        """What is certified, with the evidence; or what is missing, and how many more rows would do."""
        if self.certified:
            return (
                f"Certified with {self.confidence:.0%} confidence: at most {percent(self.risk)} of the accepted "
                f"answers are wrong. The threshold {self.threshold:.2f} accepts {self.accepted} of {self.n} with "
                f"{self.wrong} wrong, which proves at most {percent(self.bound)}."
            )
        missed = self.missed
        if missed is None or not missed.counted:
            return f"Not certified: no threshold accepts an answer with at most {percent(self.risk)} wrong."
        key = "unanswerable" if missed.unanswerable else "e"
        option = "" if missed.unanswerable else " (`--errors` of `adopt`)"
        allow = f"allow more with `{key}` of the step `calibrate`{option}"
        what = (
            f"{missed.wrong} of {missed.counted} unanswerable questions"
            if missed.unanswerable
            else f"{missed.counted} of {self.n} with {missed.wrong} wrong"
        )
        found = (
            f"Not certified: the best threshold accepts {what}, which proves at most {percent(missed.bound)}, "
            f"not {percent(missed.risk)}."
        )
        needed = trials_needed(missed.wrong, missed.counted, missed.risk, self.confidence)
        if needed is None:
            return f"{found} More rows alone will not do: improve the model, or {allow}."
        rows = missed.counted if missed.unanswerable else self.n
        more = math.ceil((needed - missed.counted) * rows / missed.counted)
        which = "unanswerable rows" if missed.unanswerable else "rows"
        return f"{found} About {more:,} more {which} in the split `threshold` would do, or {allow}."

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
        threshold = math.inf if value["threshold"] is None else value["threshold"]
        missed = Missed(**value["missed"]) if value.get("missed") else None
        return cls(**value | {"threshold": threshold, "missed": missed})


def percent(share: float) -> str:
    """A share as a percentage with at most one decimal: 0.05 -> 5%, 0.0731 -> 7.4% (bounds are rounded up)."""
    tenths = math.ceil(round(1000 * share, 6))
    return f"{tenths // 10}%" if tenths % 10 == 0 else f"{tenths / 10:.1f}%"


Count = Callable[[float], tuple[int, int]]
"""Threshold -> (counted rows, wrong rows among them) of a policy on some split."""


@dataclass(frozen=True, slots=True)
class RiskLimit:
    """At most `risk` of the counted rows (accepted answers or, if `unanswerable`, such questions) may be wrong."""

    count: Count
    risk: float
    unanswerable: bool = False

    def p_value(self, threshold: float) -> float:
        """P(at most this many wrong rows) if the error rate were `risk`; 1 without counted rows."""
        n, wrong = self.count(threshold)
        return binomial_cdf(wrong, n, self.risk)


def threshold_order(
    limits: Sequence[RiskLimit], scale: float, confidence: float, grid: Sequence[float] = GRID
) -> list[float]:
    """The order in which thresholds are tested: downwards from a start that is chosen on separate data.

    Testing has `scale` times as many rows as the data of `limits`. The start is the higher one of two: the threshold
    with the best evidence, and the highest one that is expected to accept enough answers to pass with `TOLERATED`
    errors. The best evidence is often at a threshold that just keeps the limit and then fails by chance; a much higher
    threshold accepts too few answers to prove anything. Measured with the answers of a 135M model, 20 random divisions
    of 1,470 rows: 9 were certified, from the best evidence alone 4.
    """

    def evidence(threshold: float) -> tuple[float, float]:
        found = [limit.p_value(threshold) for limit in limits]
        return max(found), sum(found)  # the sum decides where too few rows leave one limit unproved at every threshold

    best = grid.index(min(grid, key=evidence))
    count, needed = limits[0].count, least_trials(TOLERATED, limits[0].risk, confidence)
    enough = (i for i, threshold in enumerate(grid[:best]) if scale * count(threshold)[0] >= needed)
    return list(grid[next(enough, best) :])


def best_missed(limits: Sequence[RiskLimit], confidence: float, grid: Sequence[float] = GRID) -> Missed:
    """Of the thresholds that miss a limit the closest one, with the limit that it misses by most.

    Others may keep all limits and still prove nothing: testing stops at the first failure (see `guarantee`).
    """

    def at(threshold: float) -> Missed:
        found = []
        for limit in limits:
            counted, wrong = limit.count(threshold)
            bound = upper_bound(wrong, counted, confidence)
            found.append(Missed(threshold, counted, wrong, bound, limit.risk, limit.unanswerable))
        return max(found, key=lambda one: one.bound / one.risk)

    missed = [one for one in map(at, grid) if one.bound > one.risk]
    return min(missed, key=lambda one: one.bound / one.risk)


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
        return Guarantee(math.inf, risk, confidence, rows, 0, 0, 1.0, missed=best_missed(limits, confidence))
    threshold, accepted, wrong = passed
    bound = upper_bound(wrong, accepted, confidence)
    return Guarantee(threshold, risk, confidence, rows, accepted, wrong, bound)
