"""The answer gate: from an answer's signals to P(correct), and who answers in the end (SPEC F2, F4, F11).

`calibrated` accepts where P(correct) reaches the guaranteed threshold; `perplexity` (selectable) where the
answer's perplexity is at most 30. `settle` is the whole policy of the cascade; calibration counts with it
what the cascade does with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.errors import BundleError, RequestError
from cogumi.route.calibrate import Calibrator
from cogumi.route.guarantee import Guarantee
from cogumi.route.nets import Net
from cogumi.route.signals import perplexity

KINDS = ("calibrated", "perplexity")
MAX_PERPLEXITY = 30.0
FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """P(correct) = calibrator(net(signals in the order of `names`))."""

    names: tuple[str, ...]
    net: Net
    calibrator: Calibrator

    def p_correct(self, signals: Mapping[str, float]) -> float:
        """Calibrated probability that the answer with these signals is correct."""
        return float(self.p_all([signals])[0])

    def p_all(self, rows: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """The same for many rows [n]."""
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
    """Signals as an array [rows, names]."""
    return np.array([[row[name] for name in names] for row in rows], dtype=np.float64).reshape(-1, len(names))


@dataclass(frozen=True, slots=True)
class QuestionGate:
    """A question is easy if the draft reads it without surprise and its difficulty head agrees (SPEC F1).

    Beyond the perplexity `novelty` (None: no bound) a question is unlike those that the gates were calibrated on, so
    that no P(correct) means anything: no answer to it counts as sure.
    """

    perplexity: float
    p_easy: float
    novelty: float | None = None

    def novel(self, perplexity: float) -> bool:
        """Whether a question of this perplexity is outside of what was calibrated."""
        return self.novelty is not None and perplexity > self.novelty


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """calibration.json. Two policies have `guarantees`: `base` asks no modifier, `modifier` may."""

    question: QuestionGate
    base: Gate
    modifier: Gate | None
    guarantees: Mapping[str, Guarantee]

    def guarantee(self, modifiers: bool) -> Guarantee:
        """The guarantee of the policy that may ask modifiers, or of the one that may not."""
        return self.guarantees["modifier" if modifiers and self.modifier else "base"]

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns into the same calibration."""
        return {
            "format": FORMAT,
            "question": asdict(self.question),
            "base": self.base.to_json(),
            "modifier": self.modifier.to_json() if self.modifier else None,
            "guarantees": {name: g.to_json() for name, g in self.guarantees.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_json`. Raises `BundleError` if the value is no calibration of this version."""
        if value.get("format") != FORMAT:
            raise BundleError(
                f"calibration.json has format {value.get('format')}, this version reads {FORMAT}; build again"
            )
        try:
            return cls(
                QuestionGate(**value["question"]),
                Gate.from_json(value["base"]),
                Gate.from_json(value["modifier"]) if value["modifier"] else None,
                {name: Guarantee.from_json(g) for name, g in value["guarantees"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"calibration.json is incomplete ({error!r}); build the bundle again") from error


@dataclass(frozen=True, slots=True)
class Check:
    """One gate's judgement of one answer: `value` of `signal` against `threshold`."""

    p: float
    signal: str
    value: float
    threshold: float
    accepted: bool


def check(kind: str, p: float, signals: Mapping[str, float], threshold: float) -> Check:
    """Judge an answer by gate `kind`. Raises `RequestError` for an unknown kind."""
    if kind == "calibrated":
        return Check(p, "p_correct", p, threshold, p >= threshold)
    if kind == "perplexity":
        value = perplexity(signals)
        return Check(p, "perplexity", value, MAX_PERPLEXITY, value <= MAX_PERPLEXITY)
    raise RequestError(f"unknown gate '{kind}': choose one of {', '.join(KINDS)}")


def settle(base: Check, modifier: Check | None) -> tuple[str, bool]:
    """Whose answer is given, `base` or `modifier`, and whether it is given with confidence.

    The first that is accepted in the order asked; if none is, the one more likely correct. An abstention is
    judged like any answer (an unsure one is worth asking the modifier) but never counts as a confident
    answer: the promise is about answers that claim something.
    """
    if base.accepted or modifier is None:
        return "base", base.accepted
    if modifier.accepted:
        return "modifier", True
    return ("modifier" if modifier.p > base.p else "base"), False
