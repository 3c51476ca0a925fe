"""The answer cache: an answer given before is given again, to the same question and to its like (SPEC F12).

The very same question is found first; its spelling counts, but for line ends and white space around it, because in code
and names everything else can matter. Else the nearest questions of the same scope are tried, best first: one is reused
if its cosine is high enough, `confidence.reuse.conflict` finds nothing that speaks against it and, if the operator has
fitted a `check` on pairs of their own (suite `cache`), that agrees. Questions of which the embedder reads only the
beginning are found by their very text alone.

With `verified`, similarity is proven first (`confidence.verified_reuse`): a near question's answer is made afresh and
compared with the kept one until enough were the same, and now and then afterwards. What users say of answers (`judge`)
counts for that one entry; only the cache's own comparisons move what all entries share.

Kept are whole and accepted answers. One that was cut, cancelled, marked as unsure or withheld is not: the next try may
do better. Tokens are not kept, so requests for log-probabilities must pass by the cache.
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
"""Cosine from which on a kept question is considered."""
NEAREST = 4
"""Kept questions considered at most."""
_PENDING = 1_000  # look-ups whose fresh answer is waited for
_LOADED = 1_000  # partitions in memory


@dataclass(frozen=True, slots=True)
class Scope:
    """All that must be equal for an answer to be reused. `settings` holds whatever else changes answers: sampling,
    limits, formats, earlier turns of the conversation.
    """

    user: str = ""
    model: str = ""
    mode: str = ""
    adapter: str = ""
    system: str = ""
    settings: str = ""

    def digest(self) -> bytes:
        """What stands for the scope in the file; different scopes differ."""
        return _digest(json.dumps(astuple(self)))


@dataclass(frozen=True, slots=True)
class Hit:
    """A kept answer: to which question, how similar (cosine; 1 if `exact`). `entry`, `scope`, `score` and `bound`
    belong to `AnswerCache.judge`.
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
    """At most `size` answers in `folder` (None: in memory only), several threads and processes at once.

    Without an `embedder` only the very same questions are found. `similarity` is the least cosine of a near
    question. `verified` keeps wrong answers below a share of `risk` of the near hits. Raises `StateError` for a folder
    that cannot be used; afterwards a file that fails is told as a warning and costs hits, not answers.
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
        """The answer to reuse, if there is one."""
        place, key = scope.digest(), _key(question)
        with self._using():
            self._refresh()
            if entry := self._answers.lookup(place, key):
                self._answers.touch(entry.id)
                return Hit(entry.question, entry.reply, 1.0, True, place, entry.id)
        vector = self._vector(question)
        if not len(vector):
            return None
        with self._using():
            hit = self._nearest(place, question, vector)
            if hit and self._verifier:
                hit = self._proven(hit, key)
            if hit:
                self._answers.touch(hit.entry)
            return hit
        return None

    def keep(self, scope: Scope, question: str, reply: Reply) -> None:
        """Store a fresh answer, if it is whole and accepted; the entries used longest ago make room."""
        if reply.finish_reason != "stop" or not reply.accepted:
            return
        place, key = scope.digest(), _key(question)
        vector = self._vector(question)
        with self._using():
            if pending := self._pending.pop((place, key), None):
                self._learn(pending, same_text(reply.text, pending.reply.text), compared=True)
            self._answers.put(place, key, question, reply, self._encoder, vector)
            if place in self._near:
                self._near[place].stale = True
            for where, ids in groupby(sorted(self._answers.evict(self._size)), key=itemgetter(0)):
                if where in self._near:
                    self._near[where].vectors.remove([id for _, id in ids])

    def judge(self, hit: Hit, right: bool) -> None:
        """Whether a reused answer was right, as somebody says who got it; a wrong one is not given again."""
        with self._using():
            if self._verifier and not hit.exact:
                self._learn(hit, right, compared=False)
            if not right:
                self._answers.remove(hit.entry)

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._answers.close()

    def __len__(self) -> int:
        with self._lock:
            return len(self._answers)

    @property
    def _encoder(self) -> str:
        return self._embedder.identity if self._embedder else ""

    @contextmanager
    def _using(self) -> Iterator[None]:
        """The file, for one thread at a time; its failure is a warning."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                warnings.warn(f"the answer cache cannot be used at the moment: {error}", stacklevel=4)

    def _vector(self, question: str) -> NDArray[np.float32]:
        """The question's vector; empty where it must not be found by it."""
        if self._embedder and question.strip() and self._embedder.reads_all(question):
            return self._embedder.embed([question]).reshape(-1)
        return np.empty(0, np.float32)

    def _refresh(self) -> None:
        """Take in what other processes have written."""
        if self._answers.changed():
            for partition in self._near.values():
                partition.stale = True
            self._absorb()

    def _partition(self, place: bytes) -> Partition:
        assert self._embedder is not None
        partition = self._near.get(place) or Partition(Neighbours(self._embedder.width))
        self._near[place] = partition
        self._near.move_to_end(place)
        while len(self._near) > _LOADED:
            self._near.popitem(last=False)
        if partition.stale:
            if len(partition.vectors) > 2 * self._size:  # mostly gone by other processes
                partition.vectors, partition.last = Neighbours(self._embedder.width), 0
            ids, vectors = self._answers.vectors(place, self._encoder, self._embedder.width, partition.last)
            if ids:
                partition.vectors.add(ids, vectors)
                partition.last = ids[-1]
            partition.stale = False
        return partition

    def _nearest(self, place: bytes, question: str, vector: NDArray[np.float32]) -> Hit | None:
        """The best kept question that nothing speaks against."""
        partition = self._partition(place)
        for id, cosine in partition.vectors.nearest(vector, NEAREST):
            if cosine < self._similarity:
                break
            entry = self._answers.entry(place, id)
            if entry is None:  # gone by another process
                partition.vectors.remove([id])
            elif (score := self._score(question, entry, cosine)) is not None:
                return Hit(entry.question, entry.reply, cosine, False, place, id, score)
        return None

    def _score(self, question: str, entry: Entry, cosine: float) -> float | None:
        """How much speaks for reuse; None where something forbids it."""
        if conflict(question, entry.question):
            return None
        if self._check is None:
            return cosine
        logit = float(self._check.logits(pair_features(question, entry.question, cosine))[0])
        return logit if logit >= 0 or self._verifier else None  # verified: the proof draws the line

    def _proven(self, hit: Hit, key: bytes) -> Hit | None:
        """The hit if it is proven; else it waits for the fresh answer that `keep` compares it with."""
        assert self._verifier is not None
        bound = self._verifier.bound(hit.score, self._answers.judgements(hit.entry, self._basis))
        hit = replace(hit, bound=bound)
        if self._verifier.trusts(bound) and self._random.random() >= RECHECK_SHARE:
            return hit
        self._pending[hit.scope, key] = hit
        while len(self._pending) > _PENDING:
            self._pending.popitem(last=False)
        return None

    def _learn(self, hit: Hit, right: bool, *, compared: bool) -> None:
        self._answers.judge(hit.entry, self._basis, hit.score, hit.bound, right, compared)
        self._absorb()

    def _absorb(self) -> None:
        """Teach the verifier what was compared, here and in other processes."""
        if self._verifier:
            for id, score, bound, right in self._answers.compared(self._basis, self._compared):
                self._verifier.learn(score, bound, right)
                self._compared = id


@dataclass(slots=True)
class Partition:
    """One scope's vectors; `last` is the highest id among them, `stale` if the file may hold more."""

    vectors: Neighbours
    last: int = 0
    stale: bool = True


def _key(question: str) -> bytes:
    return _digest(question.replace("\r\n", "\n").lstrip("\n").rstrip())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
