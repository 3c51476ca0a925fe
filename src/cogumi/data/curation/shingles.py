"""Shingles of texts in numpy, and the exact Jaccard similarity of two texts (SPEC A4).

A shingle is a run of 8 bytes of a normalised text in UTF-8, about one word and a half of English. So one other number
or name in a short question changes many of its shingles: "What is 12 + 13?" and "What is 12 + 14?" have a similarity of
0.64. Shingles of 8 bytes are their own 64-bit values, which makes them as fast as a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

WIDTH = 8
BATCH_BYTES = 1 << 21
"""Bytes of text whose shingles are in memory at the same time (8 bytes each, a few times over)."""

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
_BITS = 44
"""Bits of a shingle that are compared, beside the number of its pair in one 64-bit value."""


def padded(text: str) -> bytes:
    """A text as UTF-8, filled with spaces to the length of one shingle."""
    return text.encode().ljust(WIDTH)


def ragged(starts: Integers, counts: Integers) -> Integers:
    """The positions `start, start + 1, ..., start + count - 1` of every run, one run after another."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def shingles(texts: NDArray[np.uint8], lengths: Integers) -> tuple[Hashes, Integers]:
    """The hashed shingles of texts that stand one after another in `texts`, with repetitions, and their number [texts].

    Every text must be at least `WIDTH` bytes long.
    """
    counts = lengths - (WIDTH - 1)
    windows = np.ndarray(len(texts) - (WIDTH - 1), "<u8", np.ascontiguousarray(texts), strides=(1,))
    return _mixed(windows[ragged(np.cumsum(lengths) - lengths, counts)]), counts


def _mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al. 2014), in place: each bit of a value affects all of the result."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


class Texts:
    """Many texts in one array of bytes, each at least `WIDTH` long: `content` [bytes] and `lengths` [texts]."""

    def __init__(self, content: NDArray[np.uint8], lengths: Integers) -> None:
        self._content, self._lengths = content, lengths
        self._starts = np.cumsum(lengths) - lengths

    def jaccard(self, pairs: Integers) -> NDArray[np.float64]:
        """The similarity of the texts of each pair [pairs, 2]: shared shingles by all their shingles, as sets."""
        found = [self._similarities(pairs[batch]) for batch in self._batches(pairs)]
        return np.concatenate([np.empty(0), *found])

    def _batches(self, pairs: Integers) -> Iterator[slice]:
        """Consecutive pairs of at most `BATCH_BYTES` together, or one pair that is longer."""
        ends, start = np.cumsum(self._lengths[pairs].sum(1)), 0
        while start < len(pairs):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + BATCH_BYTES, "right")))
            yield slice(start, stop)
            start = stop

    def _similarities(self, pairs: Integers) -> NDArray[np.float64]:
        sets = [self._sets(pairs[:, side]) for side in (0, 1)]
        both = np.sort(np.concatenate(sets))
        shared, *sizes = (
            np.bincount((part >> np.uint64(_BITS)).astype(np.int64), minlength=len(pairs))
            for part in (both[1:][both[1:] == both[:-1]], *sets)
        )
        return np.asarray(shared / (sizes[0] + sizes[1] - shared))

    def _sets(self, rows: Integers) -> Hashes:
        """The different shingles of the texts `rows`, each with the position of its text in the upper bits."""
        lengths = self._lengths[rows]
        values, counts = shingles(self._content[ragged(self._starts[rows], lengths)], lengths)
        owners = np.repeat(np.arange(len(rows), dtype=np.uint64), counts)
        found: Hashes = np.sort(owners << np.uint64(_BITS) | values >> np.uint64(64 - _BITS))
        return np.asarray(found[np.concatenate([[True], found[1:] != found[:-1]])])
