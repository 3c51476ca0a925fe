"""Stage `reader`: heads with which the base reads questions itself, on its own hidden states (SPEC M3, F1, F5).

Two regularised linear models, fitted on the readings that stage `respond` stored: `difficulty` predicts from the last
hidden state whether the base answers correctly, `router` the domain from mean and last state. So a calibrated bundle
needs neither a draft nor training by gradients. All figures are measured on rows that the measured head was not fitted
on (cross-validation).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.bundle.format import DIFFICULTY, ROUTER
from cogumi.confidence.domain_router import scope_for
from cogumi.confidence.metrics import auroc
from cogumi.confidence.nets import Net, save_head, softmax
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize, ModelFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import READINGS, read_readings, read_responses

VERSION = 1
KIND = "reader"
LIGHT = True
INPUTS = {"examples": "examples", "responses": "responses"}

FOLDS = 5
STRENGTH = 0.01
"""Inverse strength of the regularisation: a head has a weight per hidden unit, and some hundred rows."""
CLASSES = 6
"""Assumed number of domains in estimates."""

Doubles = NDArray[np.float64]


class Config(BaseModel):
    """`false_alarms`: share of known questions that may count as out of scope."""

    model_config = ConfigDict(extra="forbid")
    false_alarms: float = Field(0.02, ge=0, lt=1)


def estimate(config: Config, given: Given) -> Estimate:
    """The files of both heads, if the width of the model that answered is known."""
    model = given.find("responses", ModelFacts)
    if model is None:
        return Estimate()
    width = model.shape.hidden
    router = 4 * (4 * width + 2 * width * CLASSES + CLASSES + 1) + 600
    return Estimate((FileFacts({DIFFICULTY: FileSize(4 * width + 200), ROUTER: FileSize(router)}),))


def fit(x: Doubles, labels: Sequence[str]) -> tuple[Net, Doubles]:
    """A linear classifier of rows [n, in], and out-of-fold probabilities [n, classes] in the order of its classes.

    With one class, its probability is 1. A class with one row has probability 0 where that row is left out.
    """
    from sklearn.model_selection import StratifiedKFold

    classes, counts = np.unique(np.array(labels), return_counts=True)
    net, outside = _linear(x, labels), np.zeros((len(x), len(classes)))
    if len(classes) == 1:
        return net, outside + 1.0
    folds = StratifiedKFold(max(2, min(FOLDS, int(counts.min()))), shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with one row is in one fold only
        for rows, rest in folds.split(x, labels):
            part = _linear(x[rows], [labels[i] for i in rows])
            columns = [net.classes.index(name) for name in part.classes]
            outside[np.ix_(rest, columns)] = _probabilities(part, x[rest])
    return net, outside


def _linear(x: Doubles, labels: Sequence[str]) -> Net:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) == 1:
        width = x.shape[1]
        return Net.of(np.zeros(width), np.ones(width), [np.zeros((width, 1))], [[0.0]], [labels[0]])
    scaler = StandardScaler().fit(x)
    line = LogisticRegression(max_iter=2000, C=STRENGTH).fit(scaler.transform(x), labels)
    return Net.of(scaler.mean_, scaler.scale_, [line.coef_.T], [line.intercept_], [str(c) for c in line.classes_])


def _probabilities(net: Net, x: Doubles) -> Doubles:
    z = net.logits(x)
    binary = len(net.classes) == 2
    return softmax(np.concatenate([np.zeros_like(z), z], axis=1) if binary else z)


def difficulty_head(last: Doubles, right: Doubles) -> tuple[Doubles, float, float | None]:
    """Weight [width] and bias of the logit of "the base answers correctly" on hidden states [n, width], and the AUROC.

    Constant, with no AUROC, if nearly all or nearly no answers are correct.
    """
    if min(right.sum(), len(right) - right.sum()) < FOLDS:
        share = (right.sum() + 1) / (len(right) + 2)
        return np.zeros(last.shape[1]), float(np.log(share / (1 - share))), None
    net, outside = fit(last, ["right" if ok else "failed" for ok in right])  # the logit is that of the second class
    (weight, bias), *_ = net.layers
    scaled = weight[:, 0].astype(np.float64) / net.scale
    return scaled, float(bias[0] - scaled @ net.mean), auroc(outside[:, 1], right)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`responses` to the training questions of `examples` -> difficulty.safetensors and router.safetensors."""
    folder = inputs["responses"].path
    responses, (readings, _) = read_responses(folder), read_readings(folder / READINGS)
    domain_of = {e.id: e.domain for e in read_examples(split_path(inputs["examples"].path, "train"))}
    domains = [domain_of[name] for name in responses]
    last, mean = readings.last.astype(np.float64), readings.mean.astype(np.float64)
    right = np.array([r.correct for r in responses.values()], dtype=np.float64)

    weight, bias, auc = difficulty_head(last, right)
    save_head(weight, bias, out / DIFFICULTY)
    router, p_domain = fit(np.concatenate([mean, last], axis=1), domains)
    scope = scope_for(p_domain.max(axis=1), config.false_alarms)
    router.save(out / ROUTER, scope=scope)
    hits = np.array(router.classes)[p_domain.argmax(axis=1)] == np.array(domains)
    return {
        "rows": len(responses),
        "classes": list(router.classes),
        "scope": scope,
        "false_alarms": config.false_alarms,
        "difficulty_auroc": auc,
        "accuracy": float(hits.mean()),
        "by_domain": {str(d): float(hits[np.array(domains) == d].mean()) for d in router.classes},
    }
