"""The answer gates: from an answer's signals to P(correct), and the acceptance rule (SPEC F1, F2, F3, F4, F10).

Gate kinds: `calibrated` accepts if P(correct) reaches the guaranteed threshold of the policy, `searched` if it reaches
the threshold with the best trade-off of accuracy and cost, `perplexity` if the answer's perplexity is low enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import Net
from cogumi.confidence.policy import Policy
from cogumi.confidence.signals import BY, perplexity
from cogumi.core.errors import BundleError, RequestError

KINDS = ("calibrated", "searched", "perplexity")
TIERS = ("draft", "base", "modifier", "direct")
"""Tiers with a gate; `direct` is a modifier that answers without the base's answer before it."""
FORMAT = 3


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """P(correct) = calibrator(net(signals ordered as `names`))."""

    names: tuple[str, ...]
    net: Net
    calibrator: Calibrator

    def p_correct(self, signals: Mapping[str, float]) -> float:
        """Calibrated probability that the answer with these signals is correct."""
        return float(self.p_all([signals])[0])

    def p_all(self, rows: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """`p_correct` for many rows [n]."""
        return self.calibrator(self.net.logits(matrix(rows, self.names))[:, 0])

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns into the same gate."""
        return {
            "names": list(self.names),
            "net": self.net.to_json(),
            "calibrator": self.calibrator.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gate:
        """Inverse of `to_json`."""
        return cls(tuple(value["names"]), Net.from_json(value["net"]), Calibrator.from_json(value["calibrator"]))


def matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> NDArray[np.float64]:
    """Signals as an array [rows, names]; a row has the signal of its own modifier only (see `answered_by`)."""
    values = [[row.get(name, 0.0) if name.startswith(BY) else row[name] for name in names] for row in rows]
    return np.array(values, dtype=np.float64).reshape(-1, len(names))


def with_probe(signals: Mapping[str, float], probe: Net | None, hidden: Sequence[float]) -> Mapping[str, float]:
    """The base's signals, with the probe's logit added if there is a probe."""
    return {**signals, "probe": float(probe.logits(hidden)[0])} if probe else signals


@dataclass(frozen=True, slots=True)
class QuestionGate:
    """Thresholds on a question: easy up to the draft's perplexity `perplexity` if P(easy) is at least `p_easy`.

    Above the base's perplexity `base_perplexity` a prompt is surprising for the base. Above the draft's perplexity
    `novelty` (None: no bound) a question is out of distribution for the gates: P(correct) is then not calibrated, and
    no answer is accepted.
    """

    perplexity: float
    p_easy: float
    novelty: float | None = None
    base_perplexity: float = math.inf

    def easy(self, perplexity: float, p_easy: float) -> bool:
        """Whether a question is easy for the draft."""
        return perplexity <= self.perplexity and p_easy >= self.p_easy

    def novel(self, perplexity: float) -> bool:
        """Whether a question of this perplexity is outside the calibrated distribution."""
        return self.novelty is not None and perplexity > self.novelty


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """calibration.json: the gates of the existing `TIERS`, and thresholds by policy name.

    `probe` (or None) maps the base's hidden state after its answer to a logit, a signal of the base's gate.
    The gate kind `perplexity` accepts answers of a perplexity up to `perplexity`.
    """

    question: QuestionGate
    gates: Mapping[str, Gate]
    probe: Net | None
    perplexity: float
    guarantees: Mapping[str, Guarantee]
    searched: Mapping[str, float]

    @classmethod
    def none(cls) -> Calibration:
        """The calibration of a model without gates: no threshold, no guarantee."""
        return cls(QuestionGate(math.inf, 0.0), {}, None, math.inf, {}, {})

    @property
    def has_modifiers(self) -> bool:
        """Whether answers of modifiers were calibrated."""
        return "modifier" in self.gates

    def covering(self, policy: Policy) -> Policy:
        """The policy whose guarantee covers the accepted answers of `policy`.

        Its own; or, if that is not certified, `base`: then only answers of the base are accepted, and these are the
        ones that the policy `base` accepts. A policy in which a modifier may replace the base has only its own.
        """
        own, base = self.guarantees.get(policy.name), self.guarantees.get(Policy().name)
        replaced = policy.modifier and policy.modifier_first
        fits = base is not None and base.certified and not (own is not None and own.certified)
        return Policy() if fits and not replaced else policy

    def promise(self, policy: Policy) -> Guarantee:
        """The guarantee of a policy (see `covering`). Raises `BundleError` for a policy without calibration."""
        name = self.covering(policy).name
        if name not in self.guarantees:
            raise BundleError(f"calibration.json has no guarantee for the policy {name}; build the bundle again")
        return self.guarantees[name]

    def threshold(self, kind: str, policy: Policy, tier: str = "base") -> float:
        """The value that the gate of a `kind` compares an answer of a `tier` with (see `check`).

        The highest accepted perplexity for that kind, else the lowest P(correct); infinite if no answer of the tier is
        accepted.
        """
        if kind == "perplexity":
            return self.perplexity
        if kind == "searched":
            return self.searched.get(policy.name, math.inf)
        covering = self.covering(policy)
        if covering.name not in self.guarantees or (covering != policy and tier != "base"):
            return math.inf
        return self.guarantees[covering.name].threshold

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns into the same calibration."""
        question = {name: None if value == math.inf else value for name, value in asdict(self.question).items()}
        return {
            "format": FORMAT,
            "question": question,
            "gates": {name: gate.to_json() for name, gate in self.gates.items()},
            "probe": self.probe.to_json() if self.probe else None,
            "perplexity": self.perplexity,
            "guarantees": {name: g.to_json() for name, g in self.guarantees.items()},
            "searched": dict(self.searched),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_json`. Raises `BundleError` if the value is not a calibration of this version."""
        if value.get("format") != FORMAT:
            raise BundleError(
                f"calibration.json has format {value.get('format')}, this version reads {FORMAT}; rebuild the bundle"
            )
        try:
            question = dict(value["question"])
            for name in ("perplexity", "base_perplexity"):
                question[name] = math.inf if question[name] is None else question[name]
            return cls(
                QuestionGate(**question),
                {name: Gate.from_json(value["gates"][name]) for name in TIERS if name in value["gates"]},
                Net.from_json(value["probe"]) if value["probe"] else None,
                float(value["perplexity"]),
                {name: Guarantee.from_json(g) for name, g in value["guarantees"].items()},
                {name: float(t) for name, t in value["searched"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"calibration.json is incomplete ({error!r}); build the bundle again") from error


@dataclass(frozen=True, slots=True)
class Check:
    """Result of a gate for one answer: `value` of `signal` compared with `threshold`."""

    p: float
    signal: str
    value: float
    threshold: float
    accepted: bool


def check(kind: str, p: float, signals: Mapping[str, float], threshold: float) -> Check:
    """Apply a gate; `threshold` is the highest accepted perplexity for that `kind`, else the lowest P(correct).

    Raises `RequestError` for an unknown kind.
    """
    if kind not in KINDS:
        raise RequestError(f"unknown gate '{kind}': choose one of {', '.join(KINDS)}")
    if kind == "perplexity":
        value = perplexity(signals)
        return Check(p, "perplexity", value, threshold, value <= threshold)
    return Check(p, "p_correct", p, threshold, p >= threshold)
