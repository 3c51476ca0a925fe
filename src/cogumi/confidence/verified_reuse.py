"""Verified reuse: reuse cached answers of similar questions with a bounded error rate (SPEC F12).

After vCache (Schroeder et al. 2025, arXiv 2502.03771): every cache entry has its own estimate of P(right | score),
learned online; if a look-up is not proven yet, the question is answered anew and the answers are compared. Here the
estimate is a logistic curve whose slope and offset all entries share and which each entry shifts by its own evidence
(normal prior, Laplace approximation). Its lower bound ranks the look-ups, and an exact binomial test over verified
look-ups (`confidence.guarantee`) finds the lowest bound that can be trusted. So the guarantee "at most `risk` of the
reused answers are wrong" rests on counts, not on the model; it assumes that future look-ups are like the last `WINDOW`
verified ones. A small share of trusted look-ups is still answered anew, to detect a change of the distribution.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from cogumi.confidence.calibrators import Calibrator, fit
from cogumi.confidence.guarantee import binomial_cdf
from cogumi.confidence.nets import sigmoid

CONFIDENCE = 0.95
RECHECK_SHARE = 0.05
"""Share of trusted look-ups that are answered anew and compared."""
WINDOW = 20_000
ENTRY_STD = 1.0
"""Prior standard deviation of the entries' shifts, in logits."""
BOUND_STDS = 1.645
"""Standard deviations between estimate and lower bound: 95%, one-sided."""
_FIRST_FIT, _GROWTH = 50, 1.1  # verified look-ups before the first fit, and their growth between fits
_NEWTON_STEPS = 8  # for the shift of one entry


class Verifier:
    """Learns from verified look-ups; `risk` bounds the share of wrong answers among trusted look-ups."""

    def __init__(self, risk: float = 0.01) -> None:
        self._risk = risk
        self._scores: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._bounds: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._curve: Calibrator | None = None
        self._until_fit = _FIRST_FIT
        self.threshold = math.inf

    def bound(self, score: float, evidence: Sequence[tuple[float, bool]]) -> float:
        """Lower bound of P(right) at `score` for an entry with `evidence` (score, right); 0 before the first fit."""
        if self._curve is None:
            return 0.0
        shift, deviation = self._shift(evidence)
        z = self._curve.slope * score + self._curve.offset + shift - BOUND_STDS * deviation
        return float(sigmoid(z))

    def trusts(self, bound: float) -> bool:
        """Whether look-ups of this bound may be reused."""
        return bound >= self.threshold

    def learn(self, score: float, bound: float, right: bool) -> None:
        """Add the result of a verified look-up with its score and its bound at that time."""
        self._scores.append((score, right))
        self._bounds.append((bound, right))
        self._until_fit -= 1
        if self._until_fit <= 0:
            self._until_fit = max(_FIRST_FIT, int(len(self._scores) * (_GROWTH - 1)))
            z, y = zip(*self._scores, strict=True)
            self._curve = fit("platt", z, y)
            self.threshold = proven_threshold(self._bounds, self._risk)

    def _shift(self, evidence: Sequence[tuple[float, bool]]) -> tuple[float, float]:
        """Posterior mean and standard deviation of an entry's shift."""
        assert self._curve is not None
        shift, precision = 0.0, 1 / ENTRY_STD**2
        if evidence:
            z = np.array([self._curve.slope * score + self._curve.offset for score, _ in evidence])
            y = np.array([float(right) for _, right in evidence])
            for _ in range(_NEWTON_STEPS):
                p = sigmoid(z + shift)
                precision = 1 / ENTRY_STD**2 + float((p * (1 - p)).sum())
                shift -= float((shift / ENTRY_STD**2 + (p - y).sum()) / precision)
        return shift, precision**-0.5


def proven_threshold(verified: Sequence[tuple[float, bool]], risk: float) -> float:
    """The lowest bound for which at most `risk` of the `verified` (bound, right) above are wrong, with `CONFIDENCE`.

    Fixed-sequence testing: the first test uses the fewest rows that suffice without an error, each further test a
    tenth more; testing stops at the first failure. Infinite if the first test fails.
    """
    rows = sorted(verified, reverse=True)
    wrong = np.cumsum([not right for _, right in rows])
    n = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - risk))
    threshold = math.inf
    while n <= len(rows):
        last = rows[n - 1][0]
        while n < len(rows) and rows[n][0] == last:  # equal bounds are on the same side of a threshold
            n += 1
        if binomial_cdf(int(wrong[n - 1]), n, risk) > 1 - CONFIDENCE:
            break
        threshold = last
        n = math.ceil(n * _GROWTH)
    return threshold
