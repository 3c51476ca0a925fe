"""Trains a question router (SPEC F1, F5): one softmax over who is right, regularised until it carries over.

Every subject weighs the same and the strength of regularisation is chosen on subjects left out, both because the
router will be asked about subjects it has never seen. Measured on public data, anything more flexible (a small net,
boosted trees, squares of the features) told unseen subjects apart worse.
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
"""Inverse regularisation, in scikit-learn's sense, over rows weighing 1 on average."""
EMBEDDING = 1.0  # an embedding's values are small; this is how loud it speaks beside standardised features
FOLDS = 4


def outcomes(weak: Flags, strong: Flags) -> NDArray[np.int64]:
    """Index into `OUTCOMES` [n] from who was right [n]."""
    return 2 * np.asarray(weak, dtype=np.int64) + np.asarray(strong, dtype=np.int64)


def subject_folds(subjects: Sequence[str], folds: int, seed: int) -> list[Flags]:
    """Row masks [n] of `folds` groups of whole subjects."""
    names = np.unique(np.asarray(subjects))
    np.random.default_rng(seed).shuffle(names)
    return [np.isin(subjects, names[i::folds]) for i in range(folds)]


def fit_question(x: Doubles, weak: Flags, strong: Flags, subjects: Sequence[str], seed: int) -> tuple[Net, float]:
    """A router of rows [n, in] of `question_input`, and the regularisation chosen on subjects left out."""
    y = outcomes(weak, strong)
    loss = dict.fromkeys(STRENGTHS, 0.0)
    for unseen in subject_folds(subjects, FOLDS, seed):
        own = [s for s, out in zip(subjects, unseen, strict=True) if not out]
        for strength in STRENGTHS:
            net = _train(x[~unseen], y[~unseen], own, strength)
            loss[strength] += log_loss(forecast(net, x[unseen]).weak_right, weak[unseen])
    best = min(STRENGTHS, key=lambda strength: loss[strength])
    return _train(x, y, subjects, best), best


def _train(x: Doubles, y: NDArray[np.int64], subjects: Sequence[str], strength: float) -> Net:
    from sklearn.linear_model import LogisticRegression

    _, index, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    weight = (len(y) / len(counts) / counts)[index]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    mean[SURFACE:], scale[SURFACE:] = 0.0, 1 / EMBEDDING
    scale[scale < 1e-6] = 1.0  # a feature that never varies says nothing
    made_up = len(OUTCOMES)  # a middling row of each outcome, so that none is impossible
    z = np.vstack([(x - mean) / scale, np.zeros((made_up, x.shape[1]))])
    line = LogisticRegression(C=strength, max_iter=500)
    line.fit(z, np.append(y, np.arange(made_up)), sample_weight=np.append(weight, np.ones(made_up)))
    return Net.of(mean, scale, [line.coef_.T], [line.intercept_], OUTCOMES)
