"""Prompt-lookup decoding: drafts copied from the text itself (SPEC E2; Saxena 2023, "Prompt Lookup Decoding").

The ids that followed the previous occurrence of the last n-gram are proposed. It needs no model pass, and pays if
answers repeat their prompt or themselves: code edits, extraction, loops.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """The n-grams of one growing id sequence, and the last position of each. Belongs to one generation.

    `append` takes O(longest); memory grows by one small entry per id and n-gram length.
    """

    def __init__(self, ids: Sequence[int], longest: int = 3, shortest: int = 2) -> None:
        self._ids: list[int] = []
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(n, {}) for n in range(longest, shortest - 1, -1)]
        self._follows: int | None = None  # position after the previous occurrence of the longest matching n-gram
        for id in ids:
            self.append(id)

    def append(self, id: int) -> None:
        """Add one id to the end."""
        ids = self._ids
        ids.append(id)
        length = len(ids)
        self._follows = None
        for n, ends in self._ends:  # longest first
            if n > length:
                continue
            gram = tuple(ids[length - n :])
            if self._follows is None:
                self._follows = ends.get(gram)
            ends[gram] = length

    def propose(self, k: int) -> list[int]:
        """`k` ids that followed the latest earlier occurrence of the longest n-gram matching the end, or none.

        If the occurrence is fewer than `k` ids back, the text repeats with that period, and the proposal continues it.
        """
        if self._follows is None:
            return []
        at, period = self._follows, len(self._ids) - self._follows
        if k <= period:
            return self._ids[at : at + k]
        return [self._ids[at + i % period] for i in range(k)]
