"""Train a question router (SPEC F1, F5): multinomial logistic regression over which models are right.

All subjects have equal weight, and the regularisation strength is chosen on held-out subjects, so that the router
generalizes to unseen subjects. On public data more flexible models (a small net, boosted trees, squared features) were
worse on unseen subjects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.metrics import log_loss
from cogumi.confidence.nets import Net
from cogumi.evaluate.suites.question_router import OUTCOMES, SURFACE, forecast

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

STRENGTHS = (0.1, 0.03, 0.01, 0.003)
"""Inverse regularisation strength as in scikit-learn, for rows with mean weight 1."""
EMBEDDING = 1.0  # scale of the embedding relative to the standardised features
FOLDS = 4


def outcomes(weak: Flags, strong: Flags) -> NDArray[np.int64]:
    """Index into `OUTCOMES` [n] from the correctness of both models [n]."""
    return 2 * np.asarray(weak, dtype=np.int64) + np.asarray(strong, dtype=np.int64)


def subject_folds(subjects: Sequence[str], folds: int, seed: int) -> list[Flags]:
    """Row masks [n] of `folds` groups of whole subjects."""
    names = np.unique(np.asarray(subjects))
    np.random.default_rng(seed).shuffle(names)
    return [np.isin(subjects, names[i::folds]) for i in range(folds)]


def fit_question(x: Doubles, weak: Flags, strong: Flags, subjects: Sequence[str], seed: int) -> tuple[Net, float]:
    """A router fitted to rows [n, in] of `question_input`, and the regularisation chosen on held-out subjects."""
    y = outcomes(weak, strong)
    loss = dict.fromkeys(STRENGTHS, 0.0)
    for unseen in subject_folds(subjects, FOLDS, seed):
        seen = [s for s, out in zip(subjects, unseen, strict=True) if not out]
        for strength in STRENGTHS:
            net = _train(x[~unseen], y[~unseen], seen, strength)
            loss[strength] += log_loss(forecast(net, x[unseen]).weak_right, weak[unseen])
    best = min(STRENGTHS, key=lambda strength: loss[strength])
    return _train(x, y, subjects, best), best


def _train(x: Doubles, y: NDArray[np.int64], subjects: Sequence[str], strength: float) -> Net:
    from sklearn.linear_model import LogisticRegression

    _, index, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    weight = (len(y) / len(counts) / counts)[index]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    mean[SURFACE:], scale[SURFACE:] = 0.0, 1 / EMBEDDING
    scale[scale < 1e-6] = 1.0  # a constant feature
    pseudo = len(OUTCOMES)  # one average row per outcome, so that every class occurs
    z = np.vstack([(x - mean) / scale, np.zeros((pseudo, x.shape[1]))])
    line = LogisticRegression(C=strength, max_iter=500)
    line.fit(z, np.append(y, np.arange(pseudo)), sample_weight=np.append(weight, np.ones(pseudo)))
    return Net.of(mean, scale, [line.coef_.T], [line.intercept_], OUTCOMES)
