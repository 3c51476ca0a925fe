"""Common knowledge about everyday things.

1  kind of a thing                          2  usual place of a thing
3  which of two is bigger                   4  which of three is of another kind
5  which of four is biggest
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from cogumi.data.world.task import OPENINGS, Task, exact, no_answer

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
_INVENTED_HEAD = ("bl", "dr", "fl", "gr", "kl", "pr", "sn", "tr", "vr", "zw")
_INVENTED_TAIL = ("ick", "omp", "ust", "arf", "eeb", "onk", "ulf", "azz", "ipp", "ord", "ent", "oop")


def _a(thing: str) -> str:
    return ("an " if thing[0] in "aeiou" else "a ") + thing


def _ask(templates: tuple[str, ...], thing: str, rng: random.Random) -> str:
    opening, template, named = rng.choice(OPENINGS), rng.choice(templates), _a(thing)
    return opening + template.format(x=named, X=named[0].upper() + named[1:])


def _size(thing: str) -> int:
    return _THINGS[thing][2]


def make(difficulty: int, rng: random.Random) -> Task:
    """A question about one thing, or a comparison of several things."""
    things = sorted(_THINGS)
    if difficulty <= 2:
        thing = rng.choice(things)
        kind, place, _ = _THINGS[thing]
        return exact(_ask(_KIND if difficulty == 1 else _PLACE, thing, rng), kind if difficulty == 1 else place)
    if difficulty == 4:
        kinds = sorted({kind for kind, _, _ in _THINGS.values()})
        kind, other = rng.sample(kinds, 2)
        same = rng.sample([t for t in things if _THINGS[t][0] == kind], 2)
        odd = rng.choice([t for t in things if _THINGS[t][0] == other])
        shown = [*same, odd]
        rng.shuffle(shown)
        return exact(f"{rng.choice(OPENINGS)}Which is of another kind: {', '.join(shown)}?", odd)
    while True:
        shown = rng.sample(things, 2 if difficulty == 3 else 4)
        biggest = max(shown, key=_size)
        if sum(_size(t) == _size(biggest) for t in shown) == 1:
            break
    opening = rng.choice(OPENINGS)
    if difficulty == 3:
        return exact(f"{opening}Which is bigger, {_a(shown[0])} or {_a(shown[1])}?", biggest)
    return exact(f"{opening}Which is the biggest: {', '.join(shown)}?", biggest)


def _invented_thing(rng: random.Random) -> Task:
    """A question about a thing that does not exist."""
    thing = rng.choice(_INVENTED_HEAD) + rng.choice(_INVENTED_TAIL)
    return no_answer(_ask(rng.choice((_KIND, _PLACE)), thing, rng))


UNANSWERABLE: Mapping[str, Callable[[random.Random], Task]] = {"invented_thing": _invented_thing}
