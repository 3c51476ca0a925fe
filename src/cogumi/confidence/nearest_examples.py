"""Choice of few-shot examples for a question: its nearest neighbours, as many as its domain needs (SPEC F18). Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EXAMPLE_COUNTS = {"code": 3, "math": 3, "reasoning": 5}
DEFAULT_COUNT = 3
"""Number of examples shown per domain, and for domains without an entry."""
MIN_COSINE = 0.5
"""Smallest cosine of a near example. On the tiny bundle's selection split 95% of the questions of every domain have an
example above it; of 18 everyday questions from other domains (cooking, travel, letters) none has.
"""


def example_count(domain: str) -> int:
    """Number of examples to show for a domain."""
    return EXAMPLE_COUNTS.get(domain, DEFAULT_COUNT)


def nearest(cosines: NDArray[np.floating], domains: Sequence[str]) -> list[int]:
    """Indices of the examples to show, given their cosines [n] to the question; the nearest comes last.

    The domain of the nearest example determines the number. Empty if no example is near enough.
    """
    order = np.argsort(-cosines, kind="stable")
    if not len(order) or cosines[order[0]] < MIN_COSINE:
        return []
    best = order[: example_count(domains[order[0]])]
    return [int(i) for i in best[::-1] if cosines[i] >= MIN_COSINE]
