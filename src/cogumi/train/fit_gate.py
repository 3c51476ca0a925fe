"""Fits an answer gate: which form, which calibrator, from whose answers were correct (SPEC F2, F3).

Three forms are fitted on the gate-fit split: a logistic regression on the perplexity alone, one on all signals, and a
class-weighted net 128 -> 64 -> 32 -> 1; each with the four calibrators of `confidence.calibrators`. Calibrators are
fitted to out-of-fold logits (a net is too sure of rows it has seen). The pair with the lowest log-loss on the selection
split wins.
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
"""Signals that no gate sees: with them it learns by heart how good the base is at each domain, and is wholly wrong
about one that it was not calibrated on."""
PROBE_C = 0.05
"""Inverse regularisation of the probe: as many weights as the model is wide, and only some thousand rows."""
FEW = 2 * FOLDS  # with fewer right or wrong rows than this there is nothing to learn

Signals = Sequence[Mapping[str, float]]
Outcomes = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A gate; its honest probabilities [n] for the rows it was fitted on (out of fold); what was compared."""

    gate: Gate
    out_of_fold: Outcomes
    figures: dict[str, Any]


def fit_gate(rows: Signals, correct: Outcomes, chosen_on: Signals, chosen_by: Outcomes, seed: int) -> Fitted:
    """Fit on `rows` with `correct` [n], choose on `chosen_on` with `chosen_by` [m].

    Where nearly all rows are correct, or nearly none, the gate is their share, whatever the signals.
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
    xs, ys = matrix(chosen_on, names), np.asarray(chosen_by, dtype=np.float64)
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

    None and zeros where nearly all rows are correct, or nearly none.
    """
    if min(correct.sum(), len(correct) - correct.sum()) < FEW:
        return None, np.zeros(len(correct))
    return _train("probe", hidden, correct, seed), _out_of_fold("probe", hidden, correct, seed)


def _out_of_fold(form: str, x: Outcomes, y: Outcomes, seed: int) -> Outcomes:
    """Logits [n] of every row by a model that has not seen it."""
    from sklearn.model_selection import StratifiedKFold

    logits = np.zeros(len(y))
    for seen, unseen in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, y):
        logits[unseen] = _train(form, x[seen], y[seen], seed).logits(x[unseen])[:, 0]
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
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epoch limit is meant
        net.fit(z, y, sample_weight=weight)
    return Net.of(scaler.mean_, scaler.scale_, net.coefs_, net.intercepts_)
