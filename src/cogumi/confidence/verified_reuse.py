"""Verified reuse: when may a similar question's answer be used so that few of the reused ones are wrong (SPEC F12)?

After vCache (Schroeder et al. 2025, arXiv 2502.03771): every entry has its own estimate of P(right | score), learned
online, and what is not proven yet is answered afresh and compared. Here the estimate is a logistic one whose slope and
offset all entries share and which each entry shifts by its own evidence (a normal prior, Laplace's approximation); its
lower bound orders the look-ups, and an exact binomial test over judged look-ups (`confidence.guarantee`) says down to
where that order can be trusted. So the promise "of reused answers at most `risk` are wrong" rests on counts, not on the
model; it assumes that look-ups to come are like the last `WINDOW` judged ones. A small share of trusted look-ups is
answered afresh all the same, else nobody would notice when that ends.
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
AFRESH = 0.05
"""Share of trusted look-ups that are answered afresh and compared."""
WINDOW = 20_000
SPREAD = 1.0
"""Standard deviation, in logits, of what distinguishes entries."""
BOUND = 1.645
"""Standard deviations between estimate and lower bound: 95%, one-sided."""
_FIRST, _GROWTH = 50, 1.1  # judged look-ups before the first fit, and their growth between fits
_STEPS = 8  # Newton's, for one entry


class Verifier:
    """Learns from judged look-ups; `risk` bounds the share of wrong ones among those trusted."""

    def __init__(self, risk: float = 0.01) -> None:
        self._risk = risk
        self._scores: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._bounds: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self._line: Calibrator | None = None
        self._due = _FIRST
        self.threshold = math.inf

    def bound(self, score: float, own: Sequence[tuple[float, bool]]) -> float:
        """Lower bound of P(right) at `score` for an entry with its `own` evidence (score, right); 0 before the first
        fit.
        """
        if self._line is None:
            return 0.0
        shift, deviation = self._shift(own)
        z = self._line.slope * score + self._line.offset + shift - BOUND * deviation
        return float(sigmoid(z))

    def trusts(self, bound: float) -> bool:
        """Whether look-ups of this bound are proven."""
        return bound >= self.threshold

    def learn(self, score: float, bound: float, right: bool) -> None:
        """A look-up of this score and (earlier) bound was answered afresh and compared."""
        self._scores.append((score, right))
        self._bounds.append((bound, right))
        self._due -= 1
        if self._due <= 0:
            self._due = max(_FIRST, int(len(self._scores) * (_GROWTH - 1)))
            z, y = zip(*self._scores, strict=True)
            self._line = fit("platt", z, y)
            self.threshold = proven(self._bounds, self._risk)

    def _shift(self, own: Sequence[tuple[float, bool]]) -> tuple[float, float]:
        """Mean and standard deviation of an entry's shift."""
        assert self._line is not None
        shift, precision = 0.0, 1 / SPREAD**2
        if own:
            z = np.array([self._line.slope * score + self._line.offset for score, _ in own])
            y = np.array([float(right) for _, right in own])
            for _ in range(_STEPS):
                p = sigmoid(z + shift)
                precision = 1 / SPREAD**2 + float((p * (1 - p)).sum())
                shift -= float((shift / SPREAD**2 + (p - y).sum()) / precision)
        return shift, precision**-0.5


def proven(judged: Sequence[tuple[float, bool]], risk: float) -> float:
    """The least bound down to which at most `risk` of the judged (bound, right) are wrong, with `CONFIDENCE`.

    Fixed-sequence testing: the first test has as many rows as a proof without errors needs, each further one a tenth
    more; the first that fails ends it. Infinite if even the first fails.
    """
    rows = sorted(judged, reverse=True)
    wrong = np.cumsum([not right for _, right in rows])
    n = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - risk))
    threshold = math.inf
    while n <= len(rows):
        last = rows[n - 1][0]
        while n < len(rows) and rows[n][0] == last:  # a threshold takes equal bounds together
            n += 1
        if binomial_cdf(int(wrong[n - 1]), n, risk) > 1 - CONFIDENCE:
            break
        threshold = last
        n = math.ceil(n * _GROWTH)
    return threshold
