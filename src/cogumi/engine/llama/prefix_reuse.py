"""Choice of the cached sequence whose prefix a new prompt reuses: pure (SPEC E1).

A request takes the free sequence that shares the longest prefix with its prompt, of several the one that loses least
of its cache; if that prefix is negligible, it takes the least recently used one, so that a long conversation survives
eviction by unrelated requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cogumi.core.text import common_prefix

MIN_SHARED = 0.1
"""Share of the prompt up to which a common prefix is negligible (a template's first tokens)."""


@dataclass(slots=True)
class CachedSequence:
    """The ids in the KV cache of one sequence, and when it was last used (a rising counter; 0 is never).

    `logits` (1, vocabulary) are those after the last id, if known.
    """

    ids: list[int] = field(default_factory=list)
    used: int = 0
    logits: NDArray[np.float32] | None = None


def choose_sequence(prompt: Sequence[int], free: Mapping[int, CachedSequence]) -> tuple[int, int]:
    """The sequence to use among the `free` ones (at least one), and the number of its ids to keep."""
    common = {sequence: common_prefix(cached.ids, prompt) for sequence, cached in free.items()}
    best = max(common, key=lambda sequence: (common[sequence], -len(free[sequence].ids), -sequence))
    if common[best] <= MIN_SHARED * len(prompt):
        best = min(free, key=lambda sequence: (free[sequence].used, sequence))
    return best, common[best]
