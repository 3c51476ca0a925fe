"""Questions about a short text.

1  one fact                                 2  two facts about one person
3  three facts about three people           4  five facts about three people
5  four facts, asked indirectly via a friend
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cogumi.data.world.task import CITIES, COLORS, NAMES, Maker, Task, Wording, named, no_answer

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
_QUESTIONS: Mapping[Wording, Mapping[str, tuple[tuple[str, ...], str]]] = {
    "terse": {attribute: (asked, friend) for attribute, (_, asked, friend, _) in _FACTS.items()},
    "natural": {
        "city": (("Where does {n} live?", "Which city does {n} live in?"), "Where does {n}'s friend live?"),
        "hat": (("What color is {n}'s hat?", "Which color of hat does {n} have?"), "What color is {n}'s friend's hat?"),
        "pet": (("Which animal does {n} own?", "What pet does {n} have?"), "Which animal does {n}'s friend own?"),
        "food": (("Which food does {n} like?", "What does {n} like to eat?"), "Which food does {n}'s friend like?"),
        "job": (("What is {n}'s job?", "What does {n} do for a living?"), "What is the job of {n}'s friend?"),
    },
}
"""Attribute -> (questions, question about the friend)."""
_FRIEND: Mapping[Wording, str] = {"terse": "The friend of {n} is {f}.", "natural": "{n}'s friend is {f}."}
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


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A text and a question about it."""
    count, total = _SHAPES[difficulty]
    people = rng.sample(NAMES, count)
    facts = _text(people, total, rng)
    person, attribute, value = rng.choice(facts)
    rivals = sorted({v for _, _, v in facts})
    questions, about_friend = _QUESTIONS[wording][attribute]
    if difficulty < 5:
        return named(f"{_statements(facts)} {rng.choice(questions).format(n=person)}", value, rivals, wording)
    asker = rng.choice([n for n in NAMES if n not in people])
    friend = _FRIEND[wording].format(n=asker, f=person)
    return named(f"{friend} {_statements(facts)} {about_friend.format(n=asker)}", value, rivals, wording)


def _missing_fact(rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about an attribute of a person that the text does not mention."""
    count, total = _SHAPES[rng.choice((1, 2))]
    people = rng.sample(NAMES, count)
    facts = _text(people, total, rng)
    person = rng.choice(people)
    mentioned = {a for n, a, _ in facts if n == person}
    attribute = rng.choice([a for a in _FACTS if a not in mentioned])
    return no_answer(f"{_statements(facts)} {rng.choice(_QUESTIONS[wording][attribute][0]).format(n=person)}")


UNANSWERABLE: Mapping[str, Maker] = {"missing_fact": _missing_fact}
