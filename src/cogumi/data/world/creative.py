"""Short texts to invent, of which the parts that a program can verify are checked: form, length and words, not beauty.

1  a title with a word                        2  a sentence about a thing with a colour
3  a poem of so many lines                    4  a dialogue of two people in so many lines
5  a story of so many sentences with three words and an ending
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from cogumi.data.world.task import COLORS, NAMES, Maker, Task, Wording, openings

_THINGS = ("boat", "tower", "lamp", "dragon", "train", "clock", "island", "mirror", "bird", "violin", "storm", "key")
_PLACES = ("at sea", "in a small town", "on the moon", "in an old library", "in the mountains", "at night")
Rule = dict[str, Any]


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A text to invent, and one that has the required form."""
    asked, answer, rules = (_title, _sentence, _poem, _dialogue, _story)[difficulty - 1](rng)
    return Task(rng.choice(openings(wording)) + asked, answer, {"kind": "constraints", "rules": rules})


def _title(rng: random.Random) -> tuple[str, str, list[Rule]]:
    thing, place, most = rng.choice(_THINGS), rng.choice(_PLACES), rng.randrange(4, 9)
    rules: list[Rule] = [{"rule": "contains", "word": thing}, {"rule": "words", "least": 2, "most": most}]
    return (
        f'Invent a title for a story {place}, of at most {most} words, with the word "{thing}".',
        f"The Last {thing}",
        rules,
    )


def _sentence(rng: random.Random) -> tuple[str, str, list[Rule]]:
    thing, color, least = rng.choice(_THINGS), rng.choice(COLORS), rng.randrange(5, 10)
    rules: list[Rule] = [
        {"rule": "contains", "word": thing},
        {"rule": "contains", "word": color},
        {"rule": "sentences", "least": 1, "most": 1},
        {"rule": "words", "least": least, "most": 40},
    ]
    text = f"The {color} {thing} waited for the morning and for one more good friend."
    return f'Write one sentence of at least {least} words about a {thing} with the word "{color}".', text, rules


def _poem(rng: random.Random) -> tuple[str, str, list[Rule]]:
    thing, place, count = rng.choice(_THINGS), rng.choice(_PLACES), rng.randrange(3, 9)
    rules: list[Rule] = [{"rule": "lines", "least": count, "most": count}, {"rule": "contains", "word": thing}]
    lines = [f"The {thing} is old", *(f"and time goes by {i}" for i in range(count - 1))]
    return f"Write a poem of exactly {count} lines about a {thing} {place}.", "\n".join(lines), rules


def _dialogue(rng: random.Random) -> tuple[str, str, list[Rule]]:
    one, other = rng.sample(NAMES, 2)
    thing, count = rng.choice(_THINGS), 2 * rng.randrange(2, 5)
    rules: list[Rule] = [
        {"rule": "lines", "least": count, "most": count},
        {"rule": "times", "word": one, "count": count // 2},
        {"rule": "times", "word": other, "count": count // 2},
        {"rule": "contains", "word": thing},
    ]
    lines = [f"{(one, other)[i % 2]}: Is that your {thing}?" for i in range(count)]
    asked = (
        f"Write a dialogue of {one} and {other} about a {thing} in {count} lines. They speak in turn; each line begins "
        "with the speaker's name and a colon, and names appear nowhere else."
    )
    return asked, "\n".join(lines), rules


def _story(rng: random.Random) -> tuple[str, str, list[Rule]]:
    things, name, count = rng.sample(_THINGS, 3), rng.choice(NAMES), rng.randrange(4, 8)
    rules: list[Rule] = [{"rule": "contains", "word": word} for word in (*things, name)]
    rules += [{"rule": "sentences", "least": count, "most": count}, {"rule": "ends", "text": "The end."}]
    said = [
        f"{name} found a {things[0]}, a {things[1]} and a {things[2]}.",
        *["It was good."] * (count - 2),
        "The end.",
    ]
    asked = (
        f"Tell a story of {name} in exactly {count} sentences, with the words {things[0]}, {things[1]} and "
        f'{things[2]}. The last sentence is: "The end."'
    )
    return asked, " ".join(said), rules


UNANSWERABLE: Mapping[str, Maker] = {}
