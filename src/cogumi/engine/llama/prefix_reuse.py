"""Choice of the cached sequence whose prefix a new prompt reuses: pure (SPEC E1).

A request takes the free sequence that shares the longest prefix with its prompt; if that prefix is negligible, it takes
the least recently used one, so that a long conversation survives eviction by unrelated requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 0.1
"""Share of the prompt up to which a common prefix is negligible (a template's first tokens)."""


@dataclass(slots=True)
class CachedSequence:
    """The ids in the KV cache of one sequence, and when it was last used (a rising counter; 0 is never)."""

    ids: list[int] = field(default_factory=list)
    used: int = 0


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    if not one or not two or one[0] != two[0]:
        return 0
    longest = min(len(one), len(two))
    return bisect_left(range(1, longest + 1), True, key=lambda n: one[:n] != two[:n])


def choose_sequence(prompt: Sequence[int], free: Mapping[int, CachedSequence]) -> tuple[int, int]:
    """The sequence to use among the `free` ones (at least one), and the number of its ids to keep."""
    common = {sequence: common_prefix(cached.ids, prompt) for sequence, cached in free.items()}
    best = max(common, key=lambda sequence: (common[sequence], -sequence))
    if common[best] <= MIN_SHARED * len(prompt):
        best = min(free, key=lambda sequence: (free[sequence].used, sequence))
    return best, common[best]
