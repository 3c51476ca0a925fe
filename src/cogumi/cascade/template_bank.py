"""The template bank: a bundle's worked examples, and the choice of those to show for a question (SPEC F18)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.nearest_examples import example_count, nearest
from cogumi.engine.embedder import Embedder

Pair = tuple[str, str]
"""A question with its answer."""


class Templates:
    """Examples by domain; with an `embedder` the most similar are chosen, else random ones of the domain. Thread-safe.

    The embedder is opened at the first similarity search, because that takes longer than opening the rest of a cascade.
    """

    def __init__(self, examples: Mapping[str, Sequence[Pair]], embedder: Callable[[], Embedder] | None = None) -> None:
        self._by_domain, self._embedder = examples, embedder
        self._pairs = [pair for pairs in examples.values() for pair in pairs]
        self._domains = [domain for domain, pairs in examples.items() for _ in pairs]

    def select(self, question: str, domain: str, most: int) -> tuple[Pair, ...]:
        """Up to `most` examples for a question of that domain, the best last; deterministic."""
        if self._embedder:
            return self.similar(question)[-most:] if most else ()
        return self.random_examples(question, domain, most)

    def random_examples(self, question: str, domain: str, most: int) -> tuple[Pair, ...]:
        """Up to `most` random examples of a domain, at most its `example_count`; deterministic per question."""
        pairs = list(self._by_domain.get(domain, ()))
        return tuple(random.Random(question).sample(pairs, min(most, example_count(domain), len(pairs))))

    def similar(self, question: str) -> tuple[Pair, ...]:
        """The most similar examples, the best last; empty if none is similar, or without an embedder."""
        if not self._embedder or not self._pairs:
            return ()
        cosines = self._vectors @ self._embedder().embed([question])[0]
        return tuple(self._pairs[i] for i in nearest(cosines, self._domains))

    def fill_up(self, question: str, given: tuple[Pair, ...]) -> tuple[Pair, ...]:
        """The `given` examples, preceded by similar ones up to the number that suits the domain."""
        return (*self.similar(question)[len(given) :], *given)

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        """[n, width]; if two threads compute it at the same time, the results are equal."""
        assert self._embedder is not None
        return self._embedder().embed([question for question, _ in self._pairs])
