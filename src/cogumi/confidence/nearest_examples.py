"""Which of the known examples suit a question: the nearest ones, as many as suit their domain (SPEC F18). Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHAPES = {"code": 3, "math": 3, "reasoning": 5}
OTHERS = 3
"""Examples that are shown of a domain, and of those without a row."""
NEAR = 0.5
"""Least cosine of an example that is near. On the tiny bundle's selection split 95% of the questions of every domain
have an example above it, of 18 everyday questions from outside its world (cooking, travel, letters) none.
"""


def shape(domain: str) -> int:
    """How many examples suit a domain."""
    return SHAPES.get(domain, OTHERS)


def nearest(cosines: NDArray[np.floating], domains: Sequence[str]) -> list[int]:
    """Which of the examples, with these cosines [n] to the question, to show: the nearest stands last.

    The domain of the nearest says how many. Empty where none is near enough.
    """
    order = np.argsort(-cosines, kind="stable")
    if not len(order) or cosines[order[0]] < NEAR:
        return []
    best = order[: shape(domains[order[0]])]
    return [int(i) for i in best[::-1] if cosines[i] >= NEAR]
