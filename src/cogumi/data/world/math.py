"""Arithmetic.

1  one digit plus one digit                 2  up to 19 minus one digit
3  two digits plus one digit                4  two digits plus two digits
5  two digits minus two digits

Natural answers show their work, digit by digit: so a small model learns sums that it cannot learn to guess.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cogumi.data.world.task import Maker, Task, Wording, openings

UNANSWERABLE: Mapping[str, Maker] = {}

_PLUS: Mapping[Wording, tuple[str, ...]] = {
    "terse": ("What is {a} + {b}?", "{a} + {b} = ?", "Add {b} to {a}."),
    "natural": (
        "What is {a} plus {b}?",
        "What is {a} + {b}?",
        "How much is {a} plus {b}?",
        "I have {a} coins and get {b} more. How many coins do I have?",
        "What do you get when you add {b} to {a}?",
    ),
}
_MINUS: Mapping[Wording, tuple[str, ...]] = {
    "terse": ("What is {a} - {b}?", "{a} - {b} = ?", "Take {b} from {a}."),
    "natural": (
        "What is {a} minus {b}?",
        "What is {a} - {b}?",
        "How much is {a} minus {b}?",
        "I have {a} coins and give {b} away. How many coins are left?",
        "What do you get when you subtract {b} from {a}?",
    ),
}
_RANGES = {1: ((0, 9), (0, 9)), 2: ((0, 19), (0, 9)), 3: ((10, 99), (0, 9)), 4: ((10, 99),) * 2, 5: ((10, 99),) * 2}
"""Difficulty -> ranges of the two numbers."""


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A sum or a difference, never negative."""
    a, b = (rng.randint(*bounds) for bounds in _RANGES[difficulty])
    minus = difficulty in (2, 5)
    if minus and b > a:
        a, b = b, a
    asked = rng.choice((_MINUS if minus else _PLUS)[wording]).format(a=a, b=b)
    question = rng.choice(openings(wording)) + asked
    result = str(a - b if minus else a + b)
    if wording == "terse":
        return Task(question, result, {"kind": "numeric"})
    return Task(question, _worked(a, b, minus), {"kind": "numeric", "value": int(result)})


def _worked(a: int, b: int, minus: bool) -> str:
    """The steps of a sum or a difference; the last one ends with the result."""
    tens, units = 10 * (b // 10), b % 10
    if minus:
        steps = [(a, "-", tens), (a - tens, "-", units)] if tens and units else [(a, "-", b)]
    else:
        ones = a % 10 + units
        steps = [(a - a % 10, "+", tens)] if tens else []
        steps += [(a % 10, "+", units), (a - a % 10 + tens, "+", ones)] if a > 9 else [(a, "+", b)]
    return ", ".join(f"{x} {sign} {y} = {x - y if minus else x + y}" for x, sign, y in steps) + "."
