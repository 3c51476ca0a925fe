"""Tool calls as JSON.

1  two tools offered, one argument          2  four tools offered, one argument
3  three tools offered, two arguments       4  three tools offered, three arguments
5  four tools offered, two calls in order
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from cogumi.core.tool_wording import tool_question
from cogumi.data.world.task import CITIES, NAMES, Maker, Task, Wording, no_answer

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SONGS = ("jazz", "rock", "folk", "blues", "disco", "opera")
_ITEMS = ("milk", "bread", "rice", "tea", "soap", "cheese", "sugar", "salt")
_COUNT = tuple(str(n) for n in range(2, 50))

# name -> (parameters, request templates); {city} etc. are drawn from _VALUES
_VALUES: Mapping[str, tuple[str, ...]] = {
    "city": CITIES, "to": CITIES, "name": NAMES, "day": _DAYS, "genre": _SONGS, "item": _ITEMS, "count": _COUNT,
    "hour": tuple(str(n) for n in range(1, 13)),
}  # fmt: skip
_Offer = tuple[tuple[str, ...], tuple[str, ...]]
_ONE: Mapping[str, _Offer] = {
    "weather": (
        ("city",),
        ("What is the weather in {city}?", "Is it raining in {city}?", "Weather for {city}, please."),
    ),
    "clock": (
        ("city",),
        ("What time is it in {city}?", "Tell me the time in {city}.", "Local time of {city}?"),
    ),
    "call": (("name",), ("Call {name}.", "Ring {name} for me.", "I want to talk to {name}.")),
    "play": (("genre",), ("Play some {genre}.", "I want to hear {genre}.", "Put on {genre} music.")),
    "price": (("item",), ("What does {item} cost?", "How much is {item}?", "Price of {item}?")),
    "alarm": (("hour",), ("Wake me at {hour}.", "Set an alarm for {hour}.", "Alarm at {hour}, please.")),
    "map": (("city",), ("Show me {city} on the map.", "Where is {city}?", "Find {city} on the map.")),
    "email": (("name",), ("Write an email to {name}.", "Email {name}.", "Send {name} a mail.")),
}
_TWO: Mapping[str, _Offer] = {
    "buy": (("item", "count"), ("Buy {count} {item}.", "Order {count} of {item}.", "Get me {count} {item}.")),
    "meet": (("name", "day"), ("Meet {name} on {day}.", "Plan {day} with {name}.", "See {name} on {day}.")),
    "hotel": (("city", "count"), ("Book {count} nights in {city}.", "A hotel in {city} for {count} nights.")),
    "train": (("city", "day"), ("A train to {city} on {day}.", "Go by train to {city} on {day}.")),
}
_THREE: Mapping[str, _Offer] = {
    "flight": (
        ("city", "to", "day"),
        ("Fly from {city} to {to} on {day}.", "A flight {city} to {to}, {day}."),
    ),
    "send": (
        ("item", "count", "name"),
        ("Send {count} {item} to {name}.", "{name} needs {count} {item}: send it."),
    ),
    "party": (
        ("city", "day", "count"),
        ("A party in {city} on {day} for {count}.", "{count} guests, {city}, {day}."),
    ),
}
_ALL: Mapping[str, _Offer] = {**_ONE, **_TWO, **_THREE}


def _call(name: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    parameters, ways = _ALL[name]
    values = {p: rng.choice(_VALUES[p]) for p in parameters}
    while values.get("to") is not None and values["to"] == values["city"]:
        values["to"] = rng.choice(CITIES)
    return rng.choice(ways).format(**values), {"tool": name, "args": values}


def _question(names: list[str], asked: Sequence[str], rng: random.Random, wording: Wording) -> str:
    rng.shuffle(names)
    tools, request = [f"{n}({', '.join(_ALL[n][0])})" for n in names], " Then: ".join(asked)
    if wording == "terse":
        return f"Tools: {', '.join(tools)}. {request}"
    return tool_question(tools, request, ", or a list of two" if len(asked) > 1 else "")


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A request and the tool call, or the two calls, that fulfil it."""
    pool = {1: _ONE, 2: _ONE, 3: _TWO, 4: _THREE, 5: _ONE}[difficulty]
    wanted = rng.sample(sorted(pool), 2 if difficulty == 5 else 1)
    others = sorted(set(_ALL) - set(wanted))
    offered = [*wanted, *rng.sample(others, {1: 1, 2: 3, 3: 2, 4: 2, 5: 2}[difficulty])]
    asked, calls = zip(*(_call(name, rng) for name in wanted), strict=True)
    value: Any = list(calls) if difficulty == 5 else calls[0]
    answer = json.dumps(value, separators=(",", ":"))
    return Task(_question(offered, asked, rng, wording), answer, {"kind": "tool_call"})


def _missing_tool(rng: random.Random, wording: Wording = "terse") -> Task:
    """A request that the offered tools cannot fulfil."""
    wanted, *offered = rng.sample(sorted(_ONE), 1 + rng.choice((1, 2, 3)))
    asked, _ = _call(wanted, rng)
    return no_answer(_question(offered, [asked], rng, wording))


UNANSWERABLE: Mapping[str, Maker] = {"missing_tool": _missing_tool}
