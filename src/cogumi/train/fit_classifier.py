"""A small feed-forward classifier on vectors, returned as numpy arrays (see `confidence.nets`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import DataError

HIDDEN = (64, 32)
DECAY = 1.0  # chosen on held-out files; 0.001 is half a percentage point worse

Parts = tuple[NDArray[Any], NDArray[Any], list[NDArray[Any]], list[NDArray[Any]], list[str]]


def fit_classifier(x: NDArray[np.float64], labels: Sequence[str], epochs: int, seed: int) -> Parts:
    """Mean, scale, weights, biases and classes of a net in -> 64 -> 32 -> classes, from rows [n, in] and their labels.

    Raises `DataError` for fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) < 2:
        raise DataError(f"a router needs two domains or more, the training split has {sorted(set(labels))}")
    scaler = StandardScaler().fit(x)
    model = MLPClassifier(HIDDEN, alpha=DECAY, batch_size=min(128, len(x)), max_iter=epochs, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epoch limit is intended
        model.fit(scaler.transform(x), labels)
    return scaler.mean_, scaler.scale_, model.coefs_, model.intercepts_, [str(c) for c in model.classes_]
