"""Arithmetic.

1  one digit plus one digit                 2  up to 19 minus one digit
3  two digits plus one digit                4  two digits plus two digits
5  two digits minus two digits
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from cogumi.data.world.task import OPENINGS, Task

UNANSWERABLE: Mapping[str, Callable[[random.Random], Task]] = {}

_PLUS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {b} to {a}.")
_MINUS = ("What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}.")
_RANGES = {1: ((0, 9), (0, 9)), 2: ((0, 19), (0, 9)), 3: ((10, 99), (0, 9)), 4: ((10, 99),) * 2, 5: ((10, 99),) * 2}
"""Difficulty -> ranges of the two numbers."""


def make(difficulty: int, rng: random.Random) -> Task:
    """A sum or a difference, never negative."""
    a, b = (rng.randint(*bounds) for bounds in _RANGES[difficulty])
    minus = difficulty in (2, 5)
    if minus and b > a:
        a, b = b, a
    question = rng.choice(_MINUS if minus else _PLUS).format(a=a, b=b)
    return Task(rng.choice(OPENINGS) + question, str(a - b if minus else a + b), {"kind": "numeric"})
