"""Which cached sequence a new prompt should go on from: pure (SPEC E1).

A request goes on from the free sequence whose ids share the longest beginning with its prompt; if that is
next to nothing, it takes the one that has waited longest, so that a long conversation outlives strangers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WORTH_KEEPING = 0.1
"""Share of the prompt below which a common beginning is chance (a template's first tokens)."""


@dataclass(slots=True)
class Held:
    """What the cache of one sequence holds, and when it was last used (any rising number; 0 is never)."""

    ids: list[int] = field(default_factory=list)
    used: int = 0


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    if not one or not two or one[0] != two[0]:
        return 0
    longest = min(len(one), len(two))
    return bisect_left(range(1, longest + 1), True, key=lambda n: one[:n] != two[:n])


def choose(prompt: Sequence[int], free: Mapping[int, Held]) -> tuple[int, int]:
    """The sequence to take out of the `free` ones (at least one), and how many of its ids to keep."""
    common = {sequence: common_prefix(held.ids, prompt) for sequence, held in free.items()}
    best = max(common, key=lambda sequence: (common[sequence], -sequence))
    if common[best] <= WORTH_KEEPING * len(prompt):
        best = min(free, key=lambda sequence: (free[sequence].used, sequence))
    return best, common[best]
