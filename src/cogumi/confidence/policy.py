"""Who is asked, in which order, and whose answer is given (SPEC F1, F2, F4, F9, F19).

A policy names the tiers that may answer. The first whose answer is accepted gives it; if none is, the answer more
likely correct is given, marked as unsure. A threshold's promise is made for one whole policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Policy:
    """`draft`: the draft's own answer may stand (lossy). `modifier`: that of the question's domain may follow.

    `straight`: it answers first where the question surprises the base.
    """

    draft: bool = False
    modifier: bool = False
    straight: bool = False

    @property
    def name(self) -> str:
        """How a calibration names it: `base`, `draft+base+modifier`, `base+modifier+straight`."""
        parts = ["draft"] * self.draft + ["base"] + ["modifier"] * self.modifier
        return "+".join(parts + ["straight"] * (self.modifier and self.straight))

    def order(self, has_modifier: bool, surprising: bool) -> tuple[str, ...]:
        """The tiers to ask; `has_modifier` if the question's domain has one, `surprising` if the base is surprised.

        A modifier that answers without the base before it is called `direct`: another gate judges it.
        """
        first = ("draft",) * self.draft
        if not (self.modifier and has_modifier):
            return (*first, "base")
        return (*first, "direct") if self.straight and surprising else (*first, "base", "modifier")


POLICIES = tuple(
    Policy(draft, modifier, straight)
    for draft in (False, True)
    for modifier, straight in ((False, False), (True, False), (True, True))
)
"""Every policy that a calibration covers."""


def settle(p: Sequence[float], accepted: Sequence[bool]) -> tuple[int, bool]:
    """Which of the answers so far, in the order asked, is given, and whether with confidence.

    An abstention is judged like any answer (an unsure one is worth asking the next tier) but never counts as a
    confident answer: the promise is about answers that claim something.
    """
    for i, sure in enumerate(accepted):
        if sure:
            return i, True
    return max(range(len(p)), key=lambda i: p[i]), False


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What a policy's tiers answered to n questions, in the order asked: arrays [n, k], NaN in `p` where not asked.

    `claims` is False for abstentions; `cost` is what each answer took, in any unit.
    """

    p: Doubles
    correct: NDArray[np.bool_]
    claims: NDArray[np.bool_]
    cost: Doubles

    def given(self, threshold: float) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Which answer is given [n] and whether it is accepted [n]; `settle` for all rows at once."""
        sure = self.p >= threshold
        accepted: NDArray[np.bool_] = np.asarray(sure.any(axis=1))
        return np.where(accepted, sure.argmax(axis=1), np.nanargmax(self.p, axis=1)), accepted

    def count(self, threshold: float) -> tuple[int, int]:
        """Accepted answers that claim something, and the wrong ones among them."""
        which, accepted = self.given(threshold)
        rows = np.arange(len(which))
        kept = accepted & self.claims[rows, which]
        return int(kept.sum()), int((kept & ~self.correct[rows, which]).sum())

    def claimed(self, threshold: float) -> tuple[int, int]:
        """Questions, and those that get an accepted answer which claims something: for questions without an answer."""
        return len(self.p), self.count(threshold)[0]

    def outcome(self, threshold: float) -> tuple[float, float]:
        """Share of questions answered correctly, and mean cost of all that was asked for one."""
        which, accepted = self.given(threshold)
        asked = ~np.isnan(self.p)
        last = np.where(accepted, which, self.p.shape[1] - 1)
        spent = np.where(asked & (np.arange(self.p.shape[1]) <= last[:, None]), self.cost, 0.0).sum(axis=1)
        return float(self.correct[np.arange(len(which)), which].mean()), float(spent.mean())

    def rows(self, index: NDArray[np.intp]) -> Answers:
        """The questions of an index, in its order."""
        return Answers(self.p[index], self.correct[index], self.claims[index], self.cost[index])
