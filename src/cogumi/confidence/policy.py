"""Answer policies: which tiers are asked, in which order, and which answer is returned (SPEC F1, F2, F4, F9, F19).

The first accepted answer is returned; if no answer is accepted, the one most likely correct, marked as unsure. A
threshold is guaranteed for one whole policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Policy:
    """`draft`: the draft's answer may be returned (lossy). `modifier`: the domain's modifier answers after the base.

    `modifier_first`: it answers before the base if the question is surprising for the base.
    """

    draft: bool = False
    modifier: bool = False
    modifier_first: bool = False

    @property
    def name(self) -> str:
        """Name in a calibration: `base`, `draft+base+modifier`, `base+modifier+straight`."""
        parts = ["draft"] * self.draft + ["base"] + ["modifier"] * self.modifier
        return "+".join(parts + ["straight"] * (self.modifier and self.modifier_first))

    def order(self, has_modifier: bool, surprising: bool) -> tuple[str, ...]:
        """The tiers to ask; `has_modifier`: the domain has a modifier, `surprising`: the base's perplexity is high.

        A modifier that answers without the base before it is the tier `direct`, which has its own gate.
        """
        first = ("draft",) * self.draft
        if not (self.modifier and has_modifier):
            return (*first, "base")
        return (*first, "direct") if self.modifier_first and surprising else (*first, "base", "modifier")


POLICIES = tuple(
    Policy(draft, modifier, modifier_first)
    for draft in (False, True)
    for modifier, modifier_first in ((False, False), (True, False), (True, True))
)
"""Every policy that a calibration covers."""


def select_answer(p: Sequence[float], accepted: Sequence[bool]) -> tuple[int, bool]:
    """Index of the answer to return, among those so far in the order asked, and whether it is accepted.

    An abstention is gated like any answer (if unsure, the next tier is asked) but never counts as a confident answer:
    the guarantee covers non-abstaining answers only.
    """
    for i, sure in enumerate(accepted):
        if sure:
            return i, True
    return max(range(len(p)), key=lambda i: p[i]), False


@dataclass(frozen=True, slots=True, eq=False)
class PolicyAnswers:
    """Answers of a policy's k tiers to n questions, in the order asked: arrays [n, k]; `p` is NaN for a tier not asked.

    `claims` is False for abstentions; `cost` of each answer in any unit.
    """

    p: Doubles
    correct: NDArray[np.bool_]
    claims: NDArray[np.bool_]
    cost: Doubles

    def given(self, threshold: float) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Index of the returned answer [n] and whether it is accepted [n]; `select_answer` for all rows at once."""
        sure = self.p >= threshold
        accepted: NDArray[np.bool_] = np.asarray(sure.any(axis=1))
        return np.where(accepted, sure.argmax(axis=1), np.nanargmax(self.p, axis=1)), accepted

    def count(self, threshold: float) -> tuple[int, int]:
        """Number of accepted non-abstaining answers, and of wrong ones among them."""
        which, accepted = self.given(threshold)
        rows = np.arange(len(which))
        kept = accepted & self.claims[rows, which]
        return int(kept.sum()), int((kept & ~self.correct[rows, which]).sum())

    def claimed(self, threshold: float) -> tuple[int, int]:
        """Number of questions, and of accepted non-abstaining answers: the errors on unanswerable questions."""
        return len(self.p), self.count(threshold)[0]

    def outcome(self, threshold: float) -> tuple[float, float]:
        """Share of questions answered correctly, and mean total cost per question."""
        which, accepted = self.given(threshold)
        asked = ~np.isnan(self.p)
        last = np.where(accepted, which, self.p.shape[1] - 1)
        spent = np.where(asked & (np.arange(self.p.shape[1]) <= last[:, None]), self.cost, 0.0).sum(axis=1)
        return float(self.correct[np.arange(len(which)), which].mean()), float(spent.mean())

    def rows(self, index: NDArray[np.intp]) -> PolicyAnswers:
        """The rows of an index, in its order."""
        return PolicyAnswers(self.p[index], self.correct[index], self.claims[index], self.cost[index])
