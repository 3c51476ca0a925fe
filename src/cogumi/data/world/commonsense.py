"""Common knowledge about everyday things.

1  kind of a thing                          2  usual place of a thing
3  which of two is bigger                   4  which of three is of another kind
5  which of four is biggest
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cogumi.data.world.task import Maker, Task, Wording, named, no_answer, openings

# thing -> (kind, usual place, size rank)
_THINGS: Mapping[str, tuple[str, str, int]] = {
    "ant": ("animal", "garden", 0), "bee": ("animal", "garden", 1), "mouse": ("animal", "house", 5),
    "frog": ("animal", "water", 4), "cat": ("animal", "house", 9), "dog": ("animal", "house", 11),
    "goat": ("animal", "farm", 13), "pig": ("animal", "farm", 14), "cow": ("animal", "farm", 17),
    "horse": ("animal", "farm", 18), "shark": ("animal", "water", 20), "whale": ("animal", "water", 26),
    "pea": ("food", "kitchen", 2), "grape": ("food", "kitchen", 3), "apple": ("food", "kitchen", 6),
    "melon": ("food", "kitchen", 8), "pin": ("tool", "workshop", 1), "hammer": ("tool", "workshop", 7),
    "saw": ("tool", "workshop", 8), "ladder": ("tool", "workshop", 16), "bike": ("vehicle", "street", 15),
    "car": ("vehicle", "street", 21), "bus": ("vehicle", "street", 23), "boat": ("vehicle", "water", 22),
    "ship": ("vehicle", "water", 27), "spoon": ("tool", "kitchen", 5), "chair": ("furniture", "house", 12),
    "table": ("furniture", "house", 14), "bed": ("furniture", "house", 16), "tractor": ("vehicle", "farm", 22),
}  # fmt: skip
_KIND = (
    "What kind of thing is {x}?", "What is {x}?", "{X} is what kind of thing?", "Name the kind of {x}.",
    "To which kind belongs {x}?", "Is {x} an animal, food, a tool, a vehicle or furniture?",
)  # fmt: skip
_PLACE = (
    "Where does {x} belong?", "Where do you find {x}?", "Where is {x} at home?", "Name the place of {x}.",
    "In which place would you look for {x}?", "{X} is mostly found where?",
)  # fmt: skip
_NATURAL: Mapping[str, tuple[str, ...]] = {
    "kind": (
        "Is {x} an animal, food, a tool, a vehicle or furniture?",
        "What is {x}: animal, food, tool, vehicle or furniture?",
    ),
    "place": (
        "Where does {x} belong: farm, garden, house, kitchen, street, water or workshop?",
        "Where would you most likely find {x}: farm, garden, house, kitchen, street, water or workshop?",
    ),
}
"""In natural wording the answers to choose from are named: many other words would be right too."""
_ODD: Mapping[Wording, str] = {
    "terse": "Which is of another kind",
    "natural": "Which one does not belong with the others",
}
_TEMPLATES: Mapping[Wording, Mapping[str, tuple[str, ...]]] = {
    "terse": {"kind": _KIND, "place": _PLACE},
    "natural": _NATURAL,
}
_INVENTED_HEAD = ("bl", "dr", "fl", "gr", "kl", "pr", "sn", "tr", "vr", "zw")
_INVENTED_TAIL = ("ick", "omp", "ust", "arf", "eeb", "onk", "ulf", "azz", "ipp", "ord", "ent", "oop")
_REAL_WORDS = {
    "trick", "prick", "flick", "snick", "tromp", "trust", "snarf", "trent", "troop", "droop", "snoop", "bloop",
}  # fmt: skip
"""Words of these syllables that a pretrained model knows."""


def _a(thing: str) -> str:
    return ("an " if thing[0] in "aeiou" else "a ") + thing


def _ask(templates: tuple[str, ...], thing: str, rng: random.Random, wording: Wording) -> str:
    opening, template, shown = rng.choice(openings(wording)), rng.choice(templates), _a(thing)
    return opening + template.format(x=shown, X=shown[0].upper() + shown[1:])


def _size(thing: str) -> int:
    return _THINGS[thing][2]


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about one thing, or a comparison of several things."""
    things = sorted(_THINGS)
    if difficulty <= 2:
        thing = rng.choice(things)
        kind, place, _ = _THINGS[thing]
        about, answer = ("kind", kind) if difficulty == 1 else ("place", place)
        options = sorted({entry[difficulty - 1] for entry in _THINGS.values()})
        return named(_ask(_TEMPLATES[wording][about], thing, rng, wording), str(answer), map(str, options), wording)
    if difficulty == 4:
        kinds = sorted({kind for kind, _, _ in _THINGS.values()})
        kind, other = rng.sample(kinds, 2)
        same = rng.sample([t for t in things if _THINGS[t][0] == kind], 2)
        odd = rng.choice([t for t in things if _THINGS[t][0] == other])
        shown = [*same, odd]
        rng.shuffle(shown)
        return named(f"{rng.choice(openings(wording))}{_ODD[wording]}: {', '.join(shown)}?", odd, shown, wording)
    while True:
        shown = rng.sample(things, 2 if difficulty == 3 else 4)
        biggest = max(shown, key=_size)
        if sum(_size(t) == _size(biggest) for t in shown) == 1:
            break
    opening = rng.choice(openings(wording))
    if difficulty == 3:
        return named(f"{opening}Which is bigger, {_a(shown[0])} or {_a(shown[1])}?", biggest, shown, wording)
    return named(f"{opening}Which is the biggest: {', '.join(shown)}?", biggest, shown, wording)


def _invented_thing(rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about a thing that does not exist."""
    thing = rng.choice(_INVENTED_HEAD) + rng.choice(_INVENTED_TAIL)
    while wording == "natural" and thing in _REAL_WORDS:
        thing = rng.choice(_INVENTED_HEAD) + rng.choice(_INVENTED_TAIL)
    return no_answer(_ask(_TEMPLATES[wording][rng.choice(("kind", "place"))], thing, rng, wording))


UNANSWERABLE: Mapping[str, Maker] = {"invented_thing": _invented_thing}
