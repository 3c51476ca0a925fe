"""The answer cache: reuses an answer for the same question and for similar ones (SPEC F12).

An identical question is looked up first; only line ends and surrounding white space are ignored, because in code and
names every other difference can matter. Otherwise the most similar questions of the same scope are tried, best first:
an answer is reused if the cosine is high enough, `confidence.reuse.conflict` finds no conflict, and the optional
`check`, which an operator fits on their own pairs (suite `cache`), agrees. Questions that are too long for the embedder
are found by identical text only.

With `verified`, similarity is verified first (`confidence.verified_reuse`): the answer to a similar question is
generated and compared with the cached one until enough comparisons agree, and occasionally afterwards. A user's rating
(`judge`) affects only that entry; the state shared by all entries changes only by the cache's own comparisons.

Only complete and accepted answers are stored, not truncated, cancelled, unsure or withheld ones, because a new attempt
may be better. Tokens are not stored, so requests for log-probabilities must not use the cache.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.memory.answers import AnswerFile, Entry
from cogumi.cascade.memory.neighbours import Neighbours
from cogumi.confidence.nets import Net
from cogumi.confidence.reuse import conflict, pair_features
from cogumi.confidence.signals import same_text
from cogumi.confidence.verified_reuse import RECHECK_SHARE, Verifier
from cogumi.core.types import Reply
from cogumi.engine.embedder import Embedder

SIMILARITY = 0.92
"""Least cosine of a similar question."""
NEAREST = 4
"""Most similar questions considered."""
_MAX_PENDING = 1_000  # look-ups that wait for a fresh answer
_MAX_PARTITIONS = 1_000  # partitions in memory


@dataclass(frozen=True, slots=True)
class Scope:
    """All values that must be equal for reuse of an answer. `settings` holds other values that affect answers, such as
    sampling, limits, formats and earlier turns of the conversation.
    """

    user: str = ""
    model: str = ""
    mode: str = ""
    adapter: str = ""
    system: str = ""
    settings: str = ""

    def digest(self) -> bytes:
        """Key of the scope in the file; unique per scope."""
        return _digest(json.dumps(astuple(self)))


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached answer, its question, and their similarity (cosine; 1 if `exact`). `entry`, `scope`, `score` and `bound`
    are used by `AnswerCache.judge`.
    """

    question: str
    reply: Reply
    similarity: float
    exact: bool
    scope: bytes
    entry: int
    score: float = 0.0
    bound: float = 1.0


class AnswerCache:
    """At most `size` answers in `folder` (None: in memory only); safe for several threads and processes.

    Without an `embedder`, only identical questions are found. `similarity` is the least cosine of a similar question.
    With `verified`, at most a share of `risk` of the reused answers to similar questions is wrong. Raises `StateError`
    for an unusable folder; a later failure of the file is a warning and only causes cache misses.
    """

    def __init__(
        self,
        embedder: Embedder | None,
        folder: Path | None,
        *,
        size: int = 100_000,
        similarity: float = SIMILARITY,
        check: Net | None = None,
        verified: bool = False,
        risk: float = 0.01,
    ) -> None:
        self._embedder, self._size, self._similarity, self._check = embedder, size, similarity, check
        self._verifier = Verifier(risk) if verified else None
        self._basis = _digest(json.dumps([self._encoder, check.to_json() if check else None]))
        self._answers = AnswerFile(folder)
        self._lock = threading.Lock()
        self._near: OrderedDict[bytes, Partition] = OrderedDict()
        self._pending: OrderedDict[tuple[bytes, bytes], Hit] = OrderedDict()
        self._compared = 0
        self._random = random.Random()

    def find(self, scope: Scope, question: str) -> Hit | None:
        """Find an answer to reuse; None if there is none."""
        place, key = scope.digest(), _key(question)
        with self._locked():
            self._refresh()
            if entry := self._answers.lookup(place, key):
                self._answers.touch(entry.id)
                return Hit(entry.question, entry.reply, 1.0, True, place, entry.id)
        vector = self._vector(question)
        if not len(vector):
            return None
        with self._locked():
            hit = self._nearest(place, question, vector)
            if hit and self._verifier:
                hit = self._verified(hit, key)
            if hit:
                self._answers.touch(hit.entry)
            return hit
        return None

    def keep(self, scope: Scope, question: str, reply: Reply) -> None:
        """Store a new answer if it is complete and accepted; least recently used entries are evicted."""
        if reply.finish_reason != "stop" or not reply.accepted:
            return
        place, key = scope.digest(), _key(question)
        vector = self._vector(question)
        with self._locked():
            if pending := self._pending.pop((place, key), None):
                self._learn(pending, same_text(reply.text, pending.reply.text), compared=True)
            self._answers.put(place, key, question, reply, self._encoder, vector)
            if place in self._near:
                self._near[place].stale = True
            for where, ids in groupby(sorted(self._answers.evict(self._size)), key=itemgetter(0)):
                if where in self._near:
                    self._near[where].vectors.remove([id for _, id in ids])

    def judge(self, hit: Hit, right: bool) -> None:
        """Record a user's rating of a reused answer; a wrong one is deleted."""
        with self._locked():
            if self._verifier and not hit.exact:
                self._learn(hit, right, compared=False)
            if not right:
                self._answers.remove(hit.entry)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._answers.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._answers)

    @property
    def _encoder(self) -> str:
        return self._embedder.identity if self._embedder else ""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the file for this thread; a failure of the file is a warning."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                warnings.warn(f"the answer cache cannot be used now: {error}", stacklevel=4)

    def _vector(self, question: str) -> NDArray[np.float32]:
        """The question's vector; empty if the embedder cannot read the whole question."""
        if self._embedder and question.strip() and self._embedder.reads_all(question):
            return self._embedder.embed([question]).reshape(-1)
        return np.empty(0, np.float32)

    def _refresh(self) -> None:
        """Load entries written by other processes."""
        if self._answers.changed():
            for partition in self._near.values():
                partition.stale = True
            self._train_verifier()

    def _partition(self, place: bytes) -> Partition:
        assert self._embedder is not None
        partition = self._near.get(place) or Partition(Neighbours(self._embedder.width))
        self._near[place] = partition
        self._near.move_to_end(place)
        while len(self._near) > _MAX_PARTITIONS:
            self._near.popitem(last=False)
        if partition.stale:
            if len(partition.vectors) > 2 * self._size:  # other processes removed most of them
                partition.vectors, partition.last = Neighbours(self._embedder.width), 0
            ids, vectors = self._answers.vectors(place, self._encoder, self._embedder.width, partition.last)
            if ids:
                partition.vectors.add(ids, vectors)
                partition.last = ids[-1]
            partition.stale = False
        return partition

    def _nearest(self, place: bytes, question: str, vector: NDArray[np.float32]) -> Hit | None:
        """The most similar question without a conflict."""
        partition = self._partition(place)
        for id, cosine in partition.vectors.nearest(vector, NEAREST):
            if cosine < self._similarity:
                break
            entry = self._answers.entry(place, id)
            if entry is None:  # removed by another process
                partition.vectors.remove([id])
            elif (score := self._score(question, entry, cosine)) is not None:
                return Hit(entry.question, entry.reply, cosine, False, place, id, score)
        return None

    def _score(self, question: str, entry: Entry, cosine: float) -> float | None:
        """Score for reuse; None if it is not allowed."""
        if conflict(question, entry.question):
            return None
        if self._check is None:
            return cosine
        logit = float(self._check.logits(pair_features(question, entry.question, cosine))[0])
        return logit if logit >= 0 or self._verifier else None  # `verified` applies its own threshold

    def _verified(self, hit: Hit, key: bytes) -> Hit | None:
        """The hit if it is verified; otherwise None, and `keep` compares the hit with the fresh answer."""
        assert self._verifier is not None
        bound = self._verifier.bound(hit.score, self._answers.judgements(hit.entry, self._basis))
        hit = replace(hit, bound=bound)
        if self._verifier.trusts(bound) and self._random.random() >= RECHECK_SHARE:
            return hit
        self._pending[hit.scope, key] = hit
        while len(self._pending) > _MAX_PENDING:
            self._pending.popitem(last=False)
        return None

    def _learn(self, hit: Hit, right: bool, *, compared: bool) -> None:
        self._answers.judge(hit.entry, self._basis, hit.score, hit.bound, right, compared)
        self._train_verifier()

    def _train_verifier(self) -> None:
        """Pass new comparisons of all processes to the verifier."""
        if self._verifier:
            for id, score, bound, right in self._answers.compared(self._basis, self._compared):
                self._verifier.learn(score, bound, right)
                self._compared = id


@dataclass(slots=True)
class Partition:
    """The vectors of one scope; `last`: their highest id, `stale`: the file may hold more."""

    vectors: Neighbours
    last: int = 0
    stale: bool = True


def _key(question: str) -> bytes:
    return _digest(question.replace("\r\n", "\n").lstrip("\n").rstrip())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
