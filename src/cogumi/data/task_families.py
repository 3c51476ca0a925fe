"""Task families of few-shot episodes (SPEC A12): a form of question, and a rule that only the examples reveal.

Each episode draws a secret. A family has one of three rules:

rename   the classes (answers, tools or operations) are replaced by words drawn for the episode
suffix   every answer is followed by a word drawn for the episode
pick     the question is ambiguous between two facts; within an episode it always means the same one

The three sets below share no family, and the sets of `WORDS` no word: evaluation uses unseen families and words. They
were frozen before the first measured build.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from cogumi.data.world import make
from cogumi.data.world.task import CITIES, COLORS, NAMES, Task, exact

Draw = Callable[[random.Random, str], Task]
"""Draws a question of a class; one example of every class is enough to infer the rule."""

_POOL = 4_000

_FACTS: Mapping[str, Sequence[str]] = {
    "city": CITIES,
    "hat": COLORS,
    "pet": ("dog", "cat", "horse", "bird", "fish", "snake", "goat", "duck"),
    "food": ("soup", "pizza", "rice", "cake", "salad", "bread", "fruit", "cheese"),
    "job": ("cook", "nurse", "pilot", "baker", "judge", "singer", "farmer", "teacher"),
}
_KINDS = ("animal", "food", "tool", "vehicle", "furniture")
_PLACES = ("garden", "house", "water", "farm", "kitchen", "workshop", "street")
_THINGS = ("horse", "cow", "car", "bus", "boat", "ship", "table", "bed", "shark", "whale")
_TOOLS = ("weather", "clock", "call", "play", "price", "alarm", "map", "email")
_VERBS = ("adds", "subtracts", "multiplies")
_VAGUE = ("Tell me about {n}.", "What of {n}?", "And {n}?", "What do you know of {n}?", "Say it of {n}.")

WORDS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "east", "iron", "lead", "oak", "elm", "ash", "maple", "rose", "sun", "rain", "wind", "fog", "lake", "clay",
        "silk", "opal", "king", "ace", "jack", "arrow", "bow", "key", "bell", "hook", "net", "oar", "deck", "up",
        "high", "night", "yes", "one", "eight", "stop", "open", "far", "hard", "good", "even", "last", "north",
        "gold", "beta", "moon", "drum", "jade", "queen", "gate", "torch", "five", "zero", "plus", "true", "first",
        "vale", "club", "urgent",
    ),
    "selection": (
        "tin", "west", "lily", "star", "hail", "wool", "rook", "ring", "no", "shut", "old", "bad", "omega", "fern",
        "ivy", "copper", "two", "minus", "dry", "gamma",
    ),
    "heldout": (
        "pine", "snow", "sea", "peak", "rock", "linen", "crown", "wall", "rope", "sail", "mast", "right", "hot",
        "nine", "fast", "slow", "wet", "odd", "alpha", "birch", "harp", "amber", "door", "left", "false", "later",
    ),
}  # fmt: skip
"""Substitute words of the episodes of each set."""


@dataclass(frozen=True, slots=True)
class Family:
    """`begin(rng, words)` draws an episode's secret; returns its description, its classes, and its `Draw`."""

    domain: str
    rule: str
    begin: Callable[[random.Random, Sequence[str]], tuple[str, tuple[str, ...], Draw]]


def _distinct_words(words: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` words with different first letters."""
    letters = rng.sample(sorted({word[0] for word in words}), count)
    return [rng.choice([word for word in words if word[0] == letter]) for letter in letters]


@cache
def _questions(domain: str, levels: tuple[int, ...]) -> tuple[Task, ...]:
    """The questions of these levels that a family draws from; independent of the seed."""
    rng = random.Random(f"{domain}/{levels}")
    drawn = (make(domain, rng.choice(levels), rng) for _ in range(_POOL))
    return tuple({task.question: task for task in drawn}.values())


@cache
def _by_class(domain: str, levels: tuple[int, ...], key: Callable[[Task], str]) -> Mapping[str, Sequence[Task]]:
    classes: dict[str, list[Task]] = defaultdict(list)
    for task in _questions(domain, levels):
        classes[key(task)].append(task)
    return classes


def _answer(task: Task) -> str:
    return task.answer


def _tool(task: Task) -> str:
    return str(json.loads(task.answer)["tool"])


def _verb(task: Task) -> str:
    return next(verb for verb in _VERBS if verb in task.question)


def rename(
    domain: str, levels: tuple[int, ...], classes: Sequence[str], key: Callable[[Task], str] = _answer
) -> Family:
    """Two or three of `classes` (values of `key` over questions of these levels), each replaced by a word."""

    def begin(rng: random.Random, words: Sequence[str]) -> tuple[str, tuple[str, ...], Draw]:
        chosen = tuple(rng.sample(list(classes), rng.choice((2, 3))))
        called = dict(zip(chosen, _distinct_words(words, len(chosen), rng), strict=True))

        def draw(rng: random.Random, name: str) -> Task:
            return exact(rng.choice(_by_class(domain, levels, key)[name]).question, called[name])

        return ", ".join(f"{name} = {word}" for name, word in called.items()), chosen, draw

    return Family(domain, "rename", begin)


def suffix(domain: str, levels: tuple[int, ...]) -> Family:
    """The usual answer followed by one more word."""

    def begin(rng: random.Random, words: Sequence[str]) -> tuple[str, tuple[str, ...], Draw]:
        word = rng.choice(list(words))

        def draw(rng: random.Random, _: str) -> Task:
            task = rng.choice(_questions(domain, levels))
            return exact(task.question, f"{task.answer} {word}")

        return f"answer + {word}", ("",), draw

    return Family(domain, "suffix", begin)


def pick(first: str, second: str) -> Family:
    """Two facts about one person in random order, and a question that may mean either."""

    def fact(attribute: str, name: str, rng: random.Random) -> tuple[str, str]:
        task = rng.choice(_by_class("reading", (1,), _answer)[rng.choice(_FACTS[attribute])])
        statement = task.question[: task.question.index(".") + 1]
        return statement.replace(statement.split()[0], name, 1), task.answer

    def begin(rng: random.Random, words: Sequence[str]) -> tuple[str, tuple[str, ...], Draw]:
        meant = rng.choice((first, second))

        def draw(rng: random.Random, _: str) -> Task:
            name = rng.choice(NAMES)
            facts = {attribute: fact(attribute, name, rng) for attribute in (first, second)}
            statements = " ".join(rng.sample([text for text, _ in facts.values()], 2))
            return exact(f"{statements} {rng.choice(_VAGUE).format(n=name)}", facts[meant][1])

        return f"the {meant} is asked for", ("",), draw

    return Family("reading", "pick", begin)


FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "train": {
        "kind": rename("commonsense", (1,), _KINDS),
        "bigger": rename("commonsense", (3,), _THINGS),
        "city": rename("reading", (1, 2), _FACTS["city"]),
        "hat": rename("reading", (1, 2), _FACTS["hat"]),
        "job": rename("reading", (1, 2), _FACTS["job"]),
        "who": rename("reasoning", (1, 2), NAMES),
        "tool": rename("tools", (1, 2), _TOOLS, _tool),
        "operation": rename("code", (1,), _VERBS, _verb),
        "kind_suffix": suffix("commonsense", (1,)),
        "bigger_suffix": suffix("commonsense", (3,)),
        "reading_suffix": suffix("reading", (1, 2)),
        "city_or_hat": pick("city", "hat"),
        "city_or_job": pick("city", "job"),
        "hat_or_job": pick("hat", "job"),
    },
    "selection": {
        "food": rename("reading", (1, 2), _FACTS["food"]),
        "who_suffix": suffix("reasoning", (1, 2)),
        "food_or_hat": pick("food", "hat"),
    },
    "heldout": {
        "place": rename("commonsense", (2,), _PLACES),
        "pet": rename("reading", (1, 2), _FACTS["pet"]),
        "most": rename("reasoning", (3,), NAMES),
        "place_suffix": suffix("commonsense", (2,)),
        "pet_or_city": pick("pet", "city"),
    },
}
"""Set -> name -> family."""
