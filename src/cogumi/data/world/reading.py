"""Questions about a short text.

1  one fact                                 2  two facts about one person
3  three facts about three people           4  five facts about three people
5  four facts, asked indirectly via a friend
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from cogumi.data.world.task import CITIES, COLORS, NAMES, Task, exact, no_answer

# attribute -> (statement, two questions, question about the friend, values)
_FACTS: Mapping[str, tuple[str, tuple[str, str], str, tuple[str, ...]]] = {
    "city": (
        "{n} lives in {v}.",
        ("Where does {n} live?", "In which city is {n}?"),
        "Where does the friend of {n} live?",
        CITIES,
    ),
    "hat": (
        "{n} has a {v} hat.",
        ("What color is the hat of {n}?", "Which hat does {n} have?"),
        "Which hat does the friend of {n} have?",
        COLORS,
    ),
    "pet": (
        "{n} owns a {v}.",
        ("What does {n} own?", "Which pet does {n} own?"),
        "What does the friend of {n} own?",
        ("dog", "cat", "horse", "bird", "fish", "snake", "goat", "duck"),
    ),
    "food": (
        "{n} likes {v}.",
        ("What does {n} like?", "Which food does {n} like?"),
        "What does the friend of {n} like?",
        ("soup", "pizza", "rice", "cake", "salad", "bread", "fruit", "cheese"),
    ),
    "job": (
        "{n} is a {v}.",
        ("What is the job of {n}?", "What does {n} work as?"),
        "What is the job of the friend of {n}?",
        ("cook", "nurse", "pilot", "baker", "judge", "singer", "farmer", "teacher"),
    ),
}
_SHAPES: Mapping[int, tuple[int, int]] = {1: (1, 1), 2: (1, 2), 3: (3, 3), 4: (3, 5), 5: (2, 4)}
"""Difficulty -> (people, facts)."""


def _text(people: list[str], count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """`count` facts (person, attribute, value), at least one per person, no attribute twice for one person."""
    slots = [(p, a) for p in people for a in _FACTS]
    first = [(p, rng.choice(sorted(_FACTS))) for p in people]
    rest = rng.sample([s for s in slots if s not in first], count - len(first))
    facts = [(p, a, rng.choice(_FACTS[a][3])) for p, a in [*first, *rest]]
    rng.shuffle(facts)
    return facts


def _statements(facts: list[tuple[str, str, str]]) -> str:
    return " ".join(_FACTS[a][0].format(n=n, v=v) for n, a, v in facts)


def make(difficulty: int, rng: random.Random) -> Task:
    """A text and a question about it."""
    count, total = _SHAPES[difficulty]
    people = rng.sample(NAMES, count)
    facts = _text(people, total, rng)
    person, attribute, value = rng.choice(facts)
    if difficulty < 5:
        return exact(f"{_statements(facts)} {rng.choice(_FACTS[attribute][1]).format(n=person)}", value)
    asker = rng.choice([n for n in NAMES if n not in people])
    friend = f"The friend of {asker} is {person}."
    return exact(f"{friend} {_statements(facts)} {_FACTS[attribute][2].format(n=asker)}", value)


def _missing_fact(rng: random.Random) -> Task:
    """A question about an attribute of a person that the text does not mention."""
    count, total = _SHAPES[rng.choice((1, 2))]
    people = rng.sample(NAMES, count)
    facts = _text(people, total, rng)
    person = rng.choice(people)
    mentioned = {a for n, a, _ in facts if n == person}
    attribute = rng.choice([a for a in _FACTS if a not in mentioned])
    return no_answer(f"{_statements(facts)} {rng.choice(_FACTS[attribute][1]).format(n=person)}")


UNANSWERABLE: Mapping[str, Callable[[random.Random], Task]] = {"missing_fact": _missing_fact}
