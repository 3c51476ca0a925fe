"""The template bank: a bundle's questions with answers, those shown that suit a question best (SPEC F18)."""

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
    """Examples by domain. With an `embedder` the nearest are shown, else some of the domain. Safe for threads.

    It is opened when something near is first asked for: that takes longer than all the rest of a cascade.
    """

    def __init__(self, examples: Mapping[str, Sequence[Pair]], embedder: Callable[[], Embedder] | None = None) -> None:
        self._by_domain, self._embedder = examples, embedder
        self._pairs = [pair for pairs in examples.values() for pair in pairs]
        self._domains = [domain for domain, pairs in examples.items() for _ in pairs]

    def suiting(self, question: str, domain: str, most: int) -> tuple[Pair, ...]:
        """Up to `most` examples for a question of that domain, the best last; always the same ones."""
        if self._embedder:
            return self.near(question)[-most:] if most else ()
        return self.at_random(question, domain, most)

    def at_random(self, question: str, domain: str, most: int) -> tuple[Pair, ...]:
        """Up to `most` examples of a domain, as many as suit it; the same ones for the same question."""
        pairs = list(self._by_domain.get(domain, ()))
        return tuple(random.Random(question).sample(pairs, min(most, example_count(domain), len(pairs))))

    def near(self, question: str) -> tuple[Pair, ...]:
        """The nearest examples, the best last; none where none is near, or nobody can say so."""
        if not self._embedder or not self._pairs:
            return ()
        cosines = self._vectors @ self._embedder().embed([question])[0]
        return tuple(self._pairs[i] for i in nearest(cosines, self._domains))

    def filled_up(self, question: str, given: tuple[Pair, ...]) -> tuple[Pair, ...]:
        """The `given` examples, and before them as many near ones as a domain's shape leaves room for."""
        return (*self.near(question)[len(given) :], *given)

    @cached_property
    def _vectors(self) -> NDArray[np.float32]:
        """[n, width]; a second thread that comes at the same time computes the same."""
        assert self._embedder is not None
        return self._embedder().embed([question for question, _ in self._pairs])
