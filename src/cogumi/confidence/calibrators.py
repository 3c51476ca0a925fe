"""Calibrators: monotone maps from a gate's logit to a calibrated probability (SPEC F3).

Temperature (Guo et al. 2017) and Platt scaling (Platt 1999, with his smoothed targets) are the same sigmoid
with one or two parameters, fitted by Newton steps; isotonic regression pools adjacent violators (Ayer et
al. 1955) and interpolates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.logistic import newton
from cogumi.confidence.nets import sigmoid

Doubles = NDArray[np.float64]
NAMES = ("none", "temperature", "platt", "isotonic")


@dataclass(frozen=True, slots=True)
class Calibrator:
    """p = sigmoid(slope z + offset); with knots: linear between the knots (z, p), constant outside."""

    name: str
    slope: float = 1.0
    offset: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def __call__(self, logits: ArrayLike) -> Doubles:
        """Probabilities in [0, 1], non-decreasing in the logit."""
        z = np.asarray(logits, dtype=np.float64)
        if self.knots:
            xs, ys = zip(*self.knots, strict=True)
            return np.asarray(np.interp(z, xs, ys))
        return sigmoid(self.slope * z + self.offset)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns into an equal calibrator."""
        return {
            "name": self.name,
            "slope": self.slope,
            "offset": self.offset,
            "knots": [list(k) for k in self.knots],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibrator:
        """Inverse of `to_json`."""
        knots = tuple((float(x), float(y)) for x, y in value["knots"])
        return cls(value["name"], value["slope"], value["offset"], knots)


def fit(name: str, logits: ArrayLike, correct: ArrayLike) -> Calibrator:
    """Fit the calibrator `name` (one of `NAMES`) to logits [n] and outcomes, 1 correct or 0 wrong [n]."""
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if name == "none":
        return Calibrator(name)
    if name == "isotonic":
        return Calibrator(name, knots=_isotonic(z, y))
    positive, n = y.sum(), len(y)
    smoothed = np.where(y > 0, (positive + 1) / (positive + 2), 1 / (n - positive + 2))
    columns = z[:, None] if name == "temperature" else np.stack([z, np.ones(n)], axis=1)
    slope, offset = (*newton(columns, smoothed), 0.0)[:2]
    return Calibrator(name, max(float(slope), 1e-6), float(offset))  # a decreasing map would invert the gate


def _isotonic(z: Doubles, y: Doubles) -> tuple[tuple[float, float], ...]:
    """Knots: each pool's mean logit and its smoothed share of correct rows.

    Pools are shrunk towards one half by one pseudo-row, so that a small pool does not get probability 0 or 1;
    shrinking can break the order between pools of different sizes, so the running maximum restores it.
    """
    pools: list[tuple[float, float, float]] = []  # rows, sum of logits, sum of correct
    values, index = np.unique(z, return_inverse=True)  # equal logits must share one value
    rows, correct = np.bincount(index), np.bincount(index, weights=y)
    for value, n, c in zip(values, rows, correct, strict=True):
        pool = (float(n), float(value * n), float(c))
        while pools and pools[-1][2] / pools[-1][0] >= pool[2] / pool[0]:
            last = pools.pop()
            pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
        pools.append(pool)
    xs = [s / n for n, s, _ in pools]
    ys = np.maximum.accumulate([(c + 0.5) / (n + 1) for n, _, c in pools])
    return tuple((float(x), float(p)) for x, p in zip(xs, ys, strict=True))
