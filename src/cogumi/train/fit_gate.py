"""Fit a gate that predicts from signals whether an answer is correct: its form and its calibrator (SPEC F2, F3).

Three forms are compared: a logistic regression on the perplexity alone, one on all signals, and a class-weighted net
128 -> 64 -> 32 -> 1; each with the calibrators of `confidence.calibrators`. Form and calibrator are fitted and chosen
by cross-validation, so that a few hundred rows serve both: each row is judged by a net and a calibrator that were
fitted without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence import calibrators
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.gate import Gate, matrix
from cogumi.confidence.metrics import brier, log_loss
from cogumi.confidence.nets import Net

FOLDS = 5
FORMS = ("perplexity", "logistic", "net")
ALONE = "mean_logprob"
"""The signal of the form `perplexity`."""
HIDDEN = (128, 64, 32)
DOMAIN = "domain_"
"""Prefix of signals hidden from gates: with them a gate memorizes the base's accuracy per domain and fails on domains
that are not in the calibration data."""
PROBE_C = 0.05
"""Inverse regularisation strength of the probe, which has a weight per hidden unit but only some thousand rows."""
FEW = 6
"""Least number of right and of wrong rows."""

Signals = Sequence[Mapping[str, float]]
Outcomes = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A gate, its out-of-fold probabilities [n] on the rows it was fitted on, and the figures of the comparison."""

    gate: Gate
    out_of_fold: Outcomes
    figures: dict[str, Any]


def fit_gate(rows: Signals, correct: Outcomes, seed: int) -> Fitted:
    """Fit on `rows` with `correct` [n]; form and calibrator are those with the lowest out-of-fold log-loss.

    If nearly all or nearly no rows are correct, the gate is constant: the share of correct rows.
    """
    names = tuple(sorted({name for row in rows for name in row if not name.startswith(DOMAIN)}))
    x, y = matrix(rows, names), np.asarray(correct, dtype=np.float64)
    if min(y.sum(), len(y) - y.sum()) < FEW:
        share = (y.sum() + 1) / (len(y) + 2)
        net = Net.of(
            np.zeros(len(names)),
            np.ones(len(names)),
            [np.zeros((len(names), 1))],
            [[np.log(share / (1 - share))]],
        )
        return Fitted(
            Gate(names, net, Calibrator("none")),
            np.full(len(y), share),
            {"form": "constant", "calibrator": "none"},
        )
    candidates: list[tuple[str, str, Outcomes, Outcomes]] = []
    for form in FORMS[ALONE not in names :]:
        logits = _out_of_fold(form, x * _used(form, names), y, seed)
        candidates += [(form, name, logits, _calibrated(name, logits, y, seed)) for name in calibrators.NAMES]
    losses = [log_loss(p, y) for *_, p in candidates]
    tried = [
        {"form": form, "calibrator": name, "log_loss": loss, "brier": brier(p, y)}
        for (form, name, _, p), loss in zip(candidates, losses, strict=True)
    ]
    best = losses.index(min(losses))
    form, name, logits, p = candidates[best]
    gate = Gate(names, _train(form, x * _used(form, names), y, seed), calibrators.fit(name, logits, y))
    return Fitted(gate, p, {**tried[best], "tried": tried})


def _used(form: str, names: Sequence[str]) -> Outcomes:
    """1 for the signals that a form uses, else 0 [signals]."""
    return np.array([float(name == ALONE or form != "perplexity") for name in names])


def _calibrated(name: str, logits: Outcomes, y: Outcomes, seed: int) -> Outcomes:
    """Probabilities [n] from a calibrator that was fitted without the row."""
    p = np.zeros(len(y))
    for fit, rest in _folds(y, seed):
        p[rest] = calibrators.fit(name, logits[fit], y[fit])(logits[rest])
    return p


def fit_probe(hidden: Outcomes, correct: Outcomes, seed: int) -> tuple[Net | None, Outcomes]:
    """A linear probe of hidden states [n, width] for `correct` [n] (arXiv 2602.11877), and out-of-fold logits [n].

    None and zeros if nearly all or nearly no rows are correct.
    """
    if min(correct.sum(), len(correct) - correct.sum()) < FEW:
        return None, np.zeros(len(correct))
    return _train("probe", hidden, correct, seed), _out_of_fold("probe", hidden, correct, seed)


def _out_of_fold(form: str, x: Outcomes, y: Outcomes, seed: int) -> Outcomes:
    """Logits [n] of every row from a model fitted without it."""
    logits = np.zeros(len(y))
    for fit, rest in _folds(y, seed):
        logits[rest] = _train(form, x[fit], y[fit], seed).logits(x[rest])[:, 0]
    return logits


def _folds(y: Outcomes, seed: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Indices of the rows to fit on and of the rest, with equal shares of correct rows."""
    from sklearn.model_selection import StratifiedKFold

    yield from StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(y[:, None], y)


def _train(form: str, x: Outcomes, y: Outcomes, seed: int) -> Net:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    if form != "net":
        line = LogisticRegression(max_iter=1000, C=PROBE_C if form == "probe" else 1.0).fit(z, y)
        return Net.of(scaler.mean_, scaler.scale_, [line.coef_.T], [line.intercept_])
    weight = np.where(y > 0, len(y) / (2 * y.sum()), len(y) / (2 * (len(y) - y.sum())))
    net = MLPClassifier(
        HIDDEN,
        alpha=1e-2,
        batch_size=min(128, len(z) // 2),
        max_iter=40,
        early_stopping=True,
        n_iter_no_change=5,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epoch limit is intended
        net.fit(z, y, sample_weight=weight)
    return Net.of(scaler.mean_, scaler.scale_, net.coefs_, net.intercepts_)
