"""Metrics of confidence: calibration error, Brier score, ranking and selective risk. Pure functions on arrays [n].

ECE: Guo et al. 2017, ten fixed bins. AURC: area under the risk-coverage curve (Geifman and El-Yaniv 2017).
AUROC by ranks (Mann-Whitney), ties counting one half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 10
RESAMPLES = 2000
Doubles = NDArray[np.float64]


def _pair(p: ArrayLike, correct: ArrayLike) -> tuple[Doubles, Doubles]:
    p, correct = np.asarray(p, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.shape != correct.shape or p.ndim != 1:
        raise ValueError(f"{p.shape} probabilities for {correct.shape} outcomes")
    return p, correct


def reliability(p: ArrayLike, correct: ArrayLike) -> list[tuple[int, float, float]]:
    """Per bin of width 1/10: rows, mean probability, share correct (0, 0 for an empty bin)."""
    p, correct = _pair(p, correct)
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    rows = []
    for b in range(BINS):
        inside = bins == b
        n = int(inside.sum())
        rows.append((n, float(p[inside].mean()) if n else 0.0, float(correct[inside].mean()) if n else 0.0))
    return rows


def ece(p: ArrayLike, correct: ArrayLike) -> float:
    """Expected calibration error over ten fixed bins, in [0, 1]; 0 without rows."""
    rows = reliability(p, correct)
    total = max(sum(n for n, _, _ in rows), 1)
    return float(sum(n * abs(confidence - share) for n, confidence, share in rows) / total)


def brier(p: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared difference between probability and outcome; 0 without rows."""
    p, correct = _pair(p, correct)
    return float(np.mean((p - correct) ** 2)) if len(p) else 0.0


def log_loss(p: ArrayLike, correct: ArrayLike) -> float:
    """Mean negative log-likelihood in nats, probabilities kept 1e-6 away from 0 and 1."""
    p, correct = _pair(p, correct)
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-np.mean(correct * np.log(p) + (1 - correct) * np.log1p(-p))) if len(p) else 0.0


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """P(a positive row scores above a negative one); one half if either class is missing."""
    score, positive = _pair(score, positive)
    _, index, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    n1 = float(positive.sum())
    n0 = len(positive) - n1
    if n1 == 0 or n0 == 0:
        return 0.5
    return float((ranks[positive > 0].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean error rate of the most confident k rows, over all k; 0 without rows.

    Rows of equal confidence count as if in random order: each gets their mean error.
    """
    confidence, correct = _pair(confidence, correct)
    if not len(correct):
        return 0.0
    _, index, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(index, weights=correct) / counts
    wrong = 1 - np.repeat(share, counts)
    return float(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))


def coverage(p: ArrayLike, threshold: float) -> float:
    """Share of rows with a probability of at least the threshold; 0 without rows."""
    p = np.asarray(p, dtype=np.float64)
    return float(np.mean(p >= threshold)) if len(p) else 0.0


def crossing(lower: ArrayLike, upper: ArrayLike) -> float:
    """The threshold that separates two groups of values best (lower group: value <= threshold).

    It maximises F_lower - F_upper, which is where the two densities cross, without choosing bins.
    """
    lower, upper = np.sort(np.asarray(lower, dtype=np.float64)), np.sort(np.asarray(upper, dtype=np.float64))
    if not len(lower) or not len(upper):
        raise ValueError("both groups need values")
    values = np.unique(np.concatenate([lower, upper]))
    gain = np.searchsorted(lower, values, "right") / len(lower) - np.searchsorted(upper, values, "right") / len(upper)
    return float(values[int(np.argmax(gain))])


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of `correct` in `n` (Wilson 1927); 0 to 1 for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, scale = correct / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / scale
    return (middle - half if correct else 0.0), (middle + half if correct < n else 1.0)


def bootstrap_gain(before: Doubles, after: Doubles, seed: int) -> tuple[float, float, float]:
    """Mean gain of paired outcomes [n] and its 95% bootstrap interval."""
    difference = after - before
    draws = np.random.default_rng(seed).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)
