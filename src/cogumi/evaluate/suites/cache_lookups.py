"""Look-up time of the answer cache with 100,000 entries (SPEC F12)."""

from __future__ import annotations

import timeit
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.memory.answer_cache import AnswerCache, Scope
from cogumi.core.types import Reply, Usage
from cogumi.engine.embedder import Embedder
from cogumi.evaluate.suite import Figure

ENTRIES, LOOKUPS = 100_000, 200
MOVED = 0.02
"""Standard deviation of the noise added to each component, so that variations of a question lie around it."""

Vectors = Mapping[str, NDArray[np.float32]]


class CachedEmbedder(Embedder):
    """An encoder with precomputed vectors, so that look-ups can be timed without embedding."""

    def __init__(self, embedder: Embedder, vectors: Vectors) -> None:
        self.width, self._embedder, self._vectors = embedder.width, embedder, vectors

    identity = "known"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [n, width]."""
        known = self._vectors
        return np.stack([known[text] if text in known else self._embedder.embed([text])[0] for text in texts])

    def reads_all(self, text: str) -> bool:
        """See `Embedder`."""
        return text in self._vectors or self._embedder.reads_all(text)


def lookup_speed(embedder: Embedder, vectors: Vectors, entries: int = ENTRIES) -> list[Figure]:
    """Milliseconds of a look-up among `entries` variations of the pairs' questions with noise on their vectors."""
    rng, questions = np.random.default_rng(0), list(vectors)
    known = {}
    for i in range(entries):
        question = questions[i % len(questions)]
        moved = vectors[question] + rng.normal(0, MOVED, embedder.width).astype(np.float32)
        known[f"{question} ({i})"] = moved / np.linalg.norm(moved)
    new = [f"{question} " + "please" for question in questions[:LOOKUPS]]
    cache = AnswerCache(CachedEmbedder(embedder, known | {f"{q}!": vectors[q] for q in questions}), None, size=entries)
    reply = Reply("an answer", (), "stop", Usage(), accepted=True)
    for question in known:
        cache.keep(Scope(), question, reply)
    cache.find(Scope(), "the first look-up builds the index")
    figures = []
    for name, texts in (("", [f"{q}!" for q in questions[:LOOKUPS]]), (" with embedding", new)):
        seconds = [timeit.timeit(partial(cache.find, Scope(), text), number=1) for text in texts]
        note = f"median of {LOOKUPS}; 95% below {1000 * np.quantile(seconds, 0.95):.2f}"
        figures.append(
            Figure(f"look-up among {entries:,}{name}, ms", 1000 * float(np.median(seconds)), "<= 5", note=note)
        )
    cache.close()
    return figures
