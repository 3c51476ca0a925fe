"""Logistic regression by Newton's method, used by calibrators and learned corrections."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.nets import sigmoid

Doubles = NDArray[np.float64]
_MAX_STEPS, _MIN_STEP_SIZE, _TOLERANCE = 50, 1e-6, 1e-9


def newton(x: Doubles, y: Doubles, *, weights: ArrayLike = 1.0, start: ArrayLike = 0.0, ridge: float = 1e-9) -> Doubles:
    """Maximum-likelihood coefficients b [k] of targets y [n] in [0, 1] with `weights` [n], for logits `start` + x b.

    `x` is [n, k]; the loss includes `ridge` / 2 times b b. Step halving ensures that the loss never rises.
    """
    w, first = np.asarray(weights, dtype=np.float64), np.asarray(start, dtype=np.float64)

    def loss(b: Doubles) -> float:
        z = first + x @ b
        return float(np.sum(w * (np.logaddexp(0.0, z) - y * z)) + ridge / 2 * b @ b)

    b = np.zeros(x.shape[1])
    for _ in range(_MAX_STEPS):
        p = sigmoid(first + x @ b)
        hessian = (x * np.broadcast_to(w * p * (1 - p), len(x))[:, None]).T @ x + ridge * np.eye(len(b))
        step = np.linalg.solve(hessian, x.T @ (w * (p - y)) + ridge * b)
        size = 1.0
        while size > _MIN_STEP_SIZE and loss(b - size * step) > loss(b):
            size /= 2
        b = b - size * step
        if np.abs(size * step).max(initial=0.0) < _TOLERANCE:
            break
    return b
