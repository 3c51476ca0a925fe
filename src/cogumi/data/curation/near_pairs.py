"""Pairs of similar questions: candidates by MinHash and LSH, confirmed by exact Jaccard similarity (SPEC A4).

The 48 MinHash values of a question are cut into 12 bands of 4 (Leskovec et al. 2020, chapter 3): questions of
similarity s share a band with probability 1 - (1 - s^4)^12, 0.9982 at 0.8. Questions that share a band are sorted by
answer, and each is compared with the next `NEIGHBOURS`. So the time is proportional to the number of rows, also where
thousands share a band, and similar rows that were not compared with each other are connected through those between
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from cogumi.data.curation.shingles import Hashes, Integers, Texts
from cogumi.data.curation.sketches import SLOTS, Sketches, SketchFiles

BANDS = 12
NEIGHBOURS = 4
MARGIN = 0.17
"""A pair is compared exactly if the share of equal MinHash values is at most this far below the threshold: three of its
standard deviations."""

_PER_BAND = SLOTS // BANDS
_HALF = np.uint64(32)
_NO_PAIR = np.uint64(2**64 - 1)
_BATCH = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """For each of n rows the first row of its `cluster`, and the first row that it repeats, its `original` [n].

    Both are the row itself if there is none. A cluster is a connected component of similar questions; rows with the
    same original are one of similar questions whose answers are equal or similar too.
    """

    cluster: Integers
    original: Integers


def recall(similarity: float) -> float:
    """The probability that two questions of that similarity share a band."""
    return 1 - (1 - similarity**_PER_BAND) ** BANDS


def find_groups(sketches: Sketches, threshold: float, progress: Callable[[int, int], None]) -> Groups:
    """The groups of all rows; `progress(done, total)` counts sets of pairs."""
    rows = np.arange(len(sketches.question_keys))
    equal, distinct = _equal_questions(sketches)
    groups = _joined(Groups(rows, rows), equal, sketches, threshold)
    for done, pairs in enumerate(_likely_pairs(sketches, distinct, threshold), 1):
        groups = _joined(groups, pairs, sketches, threshold)
        progress(done, BANDS * NEIGHBOURS)
    return groups


def repeated(pairs: Sequence[tuple[str, str]], threshold: float) -> int:
    """How many of some rows, given as normalised question and answer, repeat an earlier one."""
    if not pairs:
        return 0
    with TemporaryDirectory() as folder:
        files = SketchFiles(Path(folder))
        files.append(pairs)
        original = find_groups(files.open(), threshold, lambda done, total: None).original
    return int(np.sum(original != np.arange(len(pairs))))


def _joined(groups: Groups, pairs: Integers, sketches: Sketches, threshold: float) -> Groups:
    """The groups with those of `pairs` joined that are similar. What would join nothing is not compared."""
    pairs = pairs[groups.original[pairs[:, 0]] != groups.original[pairs[:, 1]]]
    agree = _similar(sketches.answer_keys, sketches.answers, pairs, threshold)
    open_ = agree | (groups.cluster[pairs[:, 0]] != groups.cluster[pairs[:, 1]])
    pairs, agree = pairs[open_], agree[open_]
    similar = _similar(sketches.question_keys, sketches.questions, pairs, threshold)
    pairs, agree = pairs[similar], agree[similar]
    return Groups(connected(groups.cluster, pairs), connected(groups.original, pairs[agree]))


def _similar(keys: Hashes, texts: Texts, pairs: Integers, threshold: float) -> NDArray[np.bool_]:
    """Whether the texts of each pair are equal or similar [pairs]."""
    found = keys[pairs[:, 0]] == keys[pairs[:, 1]]
    found[~found] = texts.jaccard(pairs[~found]) >= threshold
    return np.asarray(found)


def connected(first: Integers, pairs: Integers) -> Integers:
    """The first row of the component of each row [n], after `pairs` [m, 2] joined components given in the same way."""
    while True:
        one, other = first[pairs[:, 0]], first[pairs[:, 1]]
        if np.array_equal(one, other):
            return first
        joined = first.copy()
        np.minimum.at(joined, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(first, joined):
            first, joined = joined, joined[joined]


def _equal_questions(sketches: Sketches) -> tuple[Integers, Integers]:
    """Pairs that connect the rows of each question, and the first row of each different question with an answer."""
    rows = np.arange(len(sketches.question_keys))
    order = np.lexsort((rows, sketches.answer_keys, sketches.question_keys))
    same_question = np.diff(sketches.question_keys[order]) == 0
    same_row = same_question & (np.diff(sketches.answer_keys[order]) == 0)
    pairs = np.sort(np.stack([order[:-1], order[1:]], 1)[same_question], axis=1)
    return pairs, np.sort(order[np.concatenate([[True], ~same_row])])


def _likely_pairs(sketches: Sketches, rows: Integers, threshold: float) -> Iterator[Integers]:
    """Sets of pairs among `rows` that share a band and enough MinHash values; no pair twice."""
    answers, known = sketches.answer_keys[rows] >> _HALF, np.array([_NO_PAIR])
    for band in range(BANDS):
        values = sketches.signatures[:, _PER_BAND * band : _PER_BAND * (band + 1)][rows]
        order, buckets = _sorted_buckets(values, answers)
        for step in range(1, NEIGHBOURS + 1):
            together = buckets[step:] == buckets[:-step]
            ends = rows[np.stack([order[:-step][together], order[step:][together]], 1)]
            found = _packed(np.sort(ends, axis=1))
            fresh = found[known[np.searchsorted(known, found)] != found]
            fresh = fresh[_shared_values(sketches.signatures, _ends(fresh)) >= threshold - MARGIN]
            known = np.sort(np.concatenate([known, fresh]))
            yield _ends(fresh)


def _packed(pairs: Integers) -> Hashes:
    """Each pair as one value."""
    ends = pairs.astype(np.uint64)
    return np.asarray(ends[:, 0] << _HALF | ends[:, 1])


def _ends(packed: Hashes) -> Integers:
    """Inverse of `_packed`."""
    return np.stack([packed >> _HALF, packed & np.uint64(0xFFFFFFFF)], 1).astype(np.int64)


def _sorted_buckets(band: NDArray[np.uint32], answers: Hashes) -> tuple[Integers, Hashes]:
    """The order of rows by bucket and then by answer, and the bucket of each position."""
    bucket = np.zeros(len(band), np.uint64)
    for column in band.T:
        bucket = (bucket ^ column) * np.uint64(0x9E3779B97F4A7C15)
        bucket ^= bucket >> _HALF
    keys = (bucket >> _HALF) << _HALF | answers
    order = np.argsort(keys, kind="stable")
    return order, keys[order] >> _HALF


def _shared_values(signatures: NDArray[np.uint32], pairs: Integers) -> NDArray[np.float64]:
    """The share of equal MinHash values of each pair: an estimate of its similarity."""
    shares = np.empty(len(pairs))
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        shares[start : start + _BATCH] = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(1)
    return shares
