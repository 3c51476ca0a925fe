"""Arithmetic.

1  one digit plus or minus one digit        2  two digits plus or minus one digit
3  two digits plus two digits               4  two digits minus two digits
5  three digits plus three digits
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from cogumi.data.world.task import NAMES, Task

UNANSWERABLE: Mapping[str, Callable[[random.Random], Task]] = {}

_THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "cups", "keys")
_PLUS = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Add {b} to {a}.",
    "{n} has {a} {t} and gets {b} more. How many {t}?",
)
_MINUS = (
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "Take {b} from {a}.",
    "{n} has {a} {t} and loses {b}. How many {t} are left?",
)


def make(difficulty: int, rng: random.Random) -> Task:
    """A sum or a difference, never negative."""
    low, high = {1: (0, 9), 2: (10, 99), 3: (10, 99), 4: (10, 99), 5: (100, 999)}[difficulty]
    a = rng.randint(low, high)
    b = rng.randint(0, 9) if difficulty <= 2 else rng.randint(low, high)
    minus = difficulty == 4 or (difficulty <= 2 and rng.random() < 0.5)
    if minus and b > a:
        a, b = b, a
    template = rng.choice(_MINUS if minus else _PLUS)
    question = template.format(a=a, b=b, n=rng.choice(NAMES), t=rng.choice(_THINGS))
    return Task(question, str(a - b if minus else a + b), {"kind": "numeric"})
