"""Fit a gate that predicts from signals whether an answer is correct: its form and its calibrator (SPEC F2, F3).

Three forms are fitted on the split `fit`: a logistic regression on the perplexity alone, one on all signals, and a
class-weighted net 128 -> 64 -> 32 -> 1; each with the calibrators of `confidence.calibrators`. Calibrators are fitted
to out-of-fold logits, because a net is overconfident on its training rows. The pair with the lowest log-loss on the
split `selection` is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence import calibrators
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.gate import Gate, matrix
from cogumi.confidence.metrics import brier, log_loss
from cogumi.confidence.nets import Net

FOLDS = 3
FORMS = ("perplexity", "logistic", "net")
ALONE = "mean_logprob"
"""The signal of the form `perplexity`."""
HIDDEN = (128, 64, 32)
DOMAIN = "domain_"
"""Prefix of signals hidden from gates: with them a gate memorizes the base's accuracy per domain and fails on domains
that are not in the calibration data."""
PROBE_C = 0.05
"""Inverse regularisation strength of the probe, which has a weight per hidden unit but only some thousand rows."""
FEW = 2 * FOLDS  # least number of right and of wrong rows

Signals = Sequence[Mapping[str, float]]
Outcomes = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A gate, its out-of-fold probabilities [n] on the rows it was fitted on, and the figures of the comparison."""

    gate: Gate
    out_of_fold: Outcomes
    figures: dict[str, Any]


def fit_gate(
    rows: Signals, correct: Outcomes, selection_rows: Signals, selection_correct: Outcomes, seed: int
) -> Fitted:
    """Fit on `rows` with `correct` [n], choose form and calibrator on `selection_rows` with `selection_correct` [m].

    If nearly all or nearly no rows are correct, the gate is constant: the share of correct rows.
    """
    names = tuple(sorted(name for name in rows[0] if not name.startswith(DOMAIN)))
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
    xs, ys = matrix(selection_rows, names), np.asarray(selection_correct, dtype=np.float64)
    candidates: list[Fitted] = []
    for form in FORMS[ALONE not in names :]:
        used = np.array([name == ALONE or form != "perplexity" for name in names])
        net, folds = _train(form, x * used, y, seed), _out_of_fold(form, x * used, y, seed)
        for name in calibrators.NAMES:
            calibrator = calibrators.fit(name, folds, y)
            p = calibrator(net.logits(xs)[:, 0])
            figures = {"form": form, "calibrator": name, "log_loss": log_loss(p, ys), "brier": brier(p, ys)}
            candidates.append(Fitted(Gate(names, net, calibrator), calibrator(folds), figures))
    best = min(candidates, key=lambda c: float(c.figures["log_loss"]))
    return replace(best, figures={**best.figures, "tried": [c.figures for c in candidates]})


def fit_probe(hidden: Outcomes, correct: Outcomes, seed: int) -> tuple[Net | None, Outcomes]:
    """A linear probe of hidden states [n, width] for `correct` [n] (arXiv 2602.11877), and out-of-fold logits [n].

    None and zeros if nearly all or nearly no rows are correct.
    """
    if min(correct.sum(), len(correct) - correct.sum()) < FEW:
        return None, np.zeros(len(correct))
    return _train("probe", hidden, correct, seed), _out_of_fold("probe", hidden, correct, seed)


def _out_of_fold(form: str, x: Outcomes, y: Outcomes, seed: int) -> Outcomes:
    """Logits [n] of every row from a model fitted without it."""
    from sklearn.model_selection import StratifiedKFold

    logits = np.zeros(len(y))
    for fit, rest in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y):
        logits[rest] = _train(form, x[fit], y[fit], seed).logits(x[rest])[:, 0]
    return logits


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
