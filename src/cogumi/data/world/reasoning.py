"""Ordering people by comparisons of pairs.

1  one pair, asked with the same word       2  one pair, asked with the opposite word
3  three people in a chain, in order        4  three people, pairs shuffled and inverted
5  four people, pairs shuffled and inverted
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise

from cogumi.data.world.task import NAMES, Maker, Task, Wording, named

UNANSWERABLE: Mapping[str, Maker] = {}

_RELATIONS = (
    ("taller", "shorter"),
    ("older", "younger"),
    ("faster", "slower"),
    ("richer", "poorer"),
    ("stronger", "weaker"),
    ("louder", "quieter"),
)
_SUPERLATIVE = {
    "taller": "tallest", "shorter": "shortest", "older": "oldest", "younger": "youngest", "faster": "fastest",
    "slower": "slowest", "richer": "richest", "poorer": "poorest", "stronger": "strongest", "weaker": "weakest",
    "louder": "loudest", "quieter": "quietest",
}  # fmt: skip
_OF_TWO: Mapping[Wording, tuple[str, ...]] = {
    "terse": ("Who is {w}?", "Who is the {w} one?", "Name the {w} one."),
    "natural": ("Who is {w}?", "Who is the {w} one?", "Which of the two is {w}?", "Who of them is {w}?"),
}
_OF_ALL: Mapping[Wording, str] = {"terse": "Who is the {w}?", "natural": "Who is the {w} of them?"}


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """Who is the most or the least of some people; `people` run from most to least."""
    more, less = rng.choice(_RELATIONS)
    if rng.random() < 0.5:
        more, less = less, more
    people = rng.sample(NAMES, {1: 2, 2: 2, 3: 3, 4: 3, 5: 4}[difficulty])
    facts = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    if difficulty <= 2:
        word = more if difficulty == 1 else less
        question = rng.choice(_OF_TWO[wording]).format(w=word)
        return named(f"{facts[0]} {question}", people[0] if difficulty == 1 else people[1], people, wording)
    if difficulty >= 4:
        pairs = list(pairwise(people))
        facts = [f"{a} is {more} than {b}." if rng.random() < 0.5 else f"{b} is {less} than {a}." for a, b in pairs]
        rng.shuffle(facts)
    top = rng.random() < 0.5
    superlative = _SUPERLATIVE[more if top else less]
    question = _OF_ALL[wording].format(w=superlative)
    return named(f"{' '.join(facts)} {question}", people[0] if top else people[-1], people, wording)
