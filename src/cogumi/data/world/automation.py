"""The automation world: tasks of several turns, with tools that have state, constraints and errors (SPEC A2b).

An environment gives a goal in words and tools. Whoever acts in it calls tools as JSON and sees their results, until it
says something that is no call, or the turn limit is reached. Success is judged by the state that the calls left, or by
the answer where a question was asked; never by the calls themselves.

1  two queries in a chain, one answer        2  two queries, then an order
3  a free hour of two calendars is booked    4  the cheapest way to buy from shops with little stock
5  as 2 or 3, but each tool is busy once, and an order must be confirmed with the code of an error
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogumi.data.world.task import NAMES
from cogumi.grading.quantities import quantities

FAMILIES = (1, 2, 3, 4, 5)
TURNS = 12
"""Most turns of one task."""
ITEMS = ("milk", "bread", "rice", "tea", "soap", "cheese", "sugar", "salt")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
SHOPS = ("Corner", "Market", "Depot", "Union")
HOURS = range(9, 17)
Arguments = Mapping[str, Any]
Result = dict[str, Any]


class ToolError(Exception):
    """What a tool answers instead of a result."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: what it does, its parameters, and the function that reads and changes the state."""

    says: str
    parameters: tuple[str, ...]
    run: Callable[[Arguments], Result]


@dataclass(slots=True)
class Environment:
    """One task. `succeeded(answer)` judges the state and the final words; `solve` is a plan that succeeds.

    `faults` counts errors that the task put in the way, `mistakes` those of calls that do not fit the tools.
    """

    goal: str
    family: int
    tools: dict[str, Tool]
    succeeded: Callable[[str], bool]
    solve: Callable[[Environment], str]
    faults: int = 0
    mistakes: int = 0

    def call(self, tool: str, arguments: Arguments) -> Result:
        """Run a tool and return its result, or {"error": ...}."""
        try:
            if tool not in self.tools:
                raise ToolError(f"there is no tool {tool}; there are {', '.join(self.tools)}")
            wanted = self.tools[tool].parameters
            if set(arguments) != set(wanted):
                raise ToolError(f"{tool} takes {', '.join(wanted)}")
            return self.tools[tool].run(arguments)
        except ToolError as error:
            self.mistakes += 1
            return {"error": str(error)}

    def describe(self) -> str:
        """The tools, one a line."""
        return "\n".join(f"{name}({', '.join(tool.parameters)}): {tool.says}" for name, tool in self.tools.items())


@dataclass(slots=True)
class _State:
    """People and items by name with their ids, stock, orders, bookings and purchases."""

    people: dict[str, int]
    items: dict[str, int]
    phones: dict[int, int] = field(default_factory=dict)
    busy: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    offers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    orders: list[tuple[int, int, int]] = field(default_factory=list)
    bookings: list[tuple[frozenset[str], str, int]] = field(default_factory=list)
    bought: list[tuple[str, int]] = field(default_factory=list)


def make(family: int, rng: random.Random) -> Environment:
    """One task of a family; the same generator state gives the same task."""
    names = rng.sample(NAMES, 6)
    ids = rng.sample(range(100, 1000), len(names) + len(ITEMS))
    state = _State(dict(zip(names, ids, strict=False)), dict(zip(ITEMS, ids[len(names) :], strict=True)))
    if family == 1:
        return _lookup(state, rng)
    if family == 4:
        return _shopping(state, rng)
    ordering = family == 2 or (family == 5 and rng.random() < 0.5)
    made = _ordering(state, rng) if ordering else _scheduling(state, rng)
    made.family = family
    return _with_faults(made, rng) if family == 5 else made


def _whole(value: Any, name: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ToolError(f"{name} must be a whole number")
    return value


def _known(value: Any, among: Mapping[str, Any] | Sequence[str], name: str) -> str:
    if value not in among:
        raise ToolError(f"there is no {name} {value}")
    return str(value)


def _find_person(state: _State) -> Tool:
    return Tool(
        "the id of a person",
        ("name",),
        lambda given: {"id": state.people[_known(given["name"], state.people, "person")]},
    )


def _lookup(state: _State, rng: random.Random) -> Environment:
    name = rng.choice(list(state.people))
    state.phones = {id: rng.randrange(10_000, 100_000) for id in state.people.values()}

    def phone(given: Arguments) -> Result:
        if (id := _whole(given["id"], "id")) not in state.phones:
            raise ToolError(f"there is no person with id {id}")
        return {"phone": state.phones[id]}

    number = state.phones[state.people[name]]

    def solve(env: Environment) -> str:
        return str(env.call("phone", {"id": env.call("find_person", {"name": name})["id"]})["phone"])

    def succeeded(answer: str) -> bool:
        return {str(q) for q in quantities(answer)} == {str(number)}

    tools = {
        "find_person": _find_person(state),
        "phone": Tool("the phone number of the person with an id", ("id",), phone),
    }
    return Environment(f"What is the phone number of {name}?", 1, tools, succeeded, solve)


def _ordering(state: _State, rng: random.Random) -> Environment:
    name, item, count = rng.choice(list(state.people)), rng.choice(ITEMS), rng.randrange(2, 10)

    def order(given: Arguments) -> Result:
        person, wanted, n = (_whole(given[key], key) for key in ("person_id", "item_id", "count"))
        if person not in state.people.values() or wanted not in state.items.values() or n < 1:
            raise ToolError("the person, the item or the count is wrong")
        state.orders.append((person, wanted, n))
        return {"ordered": n}

    def solve(env: Environment) -> str:
        person = _persist(env, "find_person", {"name": name})["id"]
        wanted = _persist(env, "find_item", {"item": item})["id"]
        _persist(env, "order", {"person_id": person, "item_id": wanted, "count": count})
        return "done"

    tools = {
        "find_person": _find_person(state),
        "find_item": Tool(
            "the id of an item",
            ("item",),
            lambda given: {"id": state.items[_known(given["item"], state.items, "item")]},
        ),
        "order": Tool("order items for a person", ("person_id", "item_id", "count"), order),
    }
    right = [(state.people[name], state.items[item], count)]
    return Environment(f"Order {count} {item} for {name}.", 2, tools, lambda answer: state.orders == right, solve)


def _scheduling(state: _State, rng: random.Random) -> Environment:
    one, other = rng.sample(list(state.people), 2)
    day = rng.choice(DAYS)
    free = rng.choice(HOURS)
    for name in state.people:
        for each in DAYS:
            state.busy[name, each] = set(rng.sample(HOURS, 5)) - ({free} if each == day else set())

    def busy_hours(given: Arguments) -> Result:
        name, each = _known(given["name"], state.people, "person"), _known(given["day"], DAYS, "day")
        return {"busy": sorted(state.busy[name, each]), "from": HOURS[0], "to": HOURS[-1]}

    def book(given: Arguments) -> Result:
        names = given["names"] if isinstance(given["names"], list) else str(given["names"]).replace(",", " ").split()
        people = frozenset(_known(name, state.people, "person") for name in names if name != "and")
        each, hour = _known(given["day"], DAYS, "day"), _whole(given["hour"], "hour")
        if hour not in HOURS:
            raise ToolError(f"hours are {HOURS[0]} to {HOURS[-1]}")
        if taken := [name for name in sorted(people) if hour in state.busy[name, each]]:
            raise ToolError(f"{taken[0]} is busy at {hour}")
        state.bookings.append((people, each, hour))
        return {"booked": hour}

    def solve(env: Environment) -> str:
        taken = {h for name in (one, other) for h in _persist(env, "busy_hours", {"name": name, "day": day})["busy"]}
        hour = next(h for h in HOURS if h not in taken)
        _persist(env, "book", {"names": [one, other], "day": day, "hour": hour})
        return "done"

    def succeeded(answer: str) -> bool:
        return len(state.bookings) == 1 and state.bookings[0][:2] == (frozenset({one, other}), day)

    tools = {
        "busy_hours": Tool("the hours at which a person is busy", ("name", "day"), busy_hours),
        "book": Tool("book a meeting of one hour", ("names", "day", "hour"), book),
    }
    goal = f"Book one meeting of {one} and {other} on {day}, at an hour when both are free."
    return Environment(goal, 3, tools, succeeded, solve)


def _shopping(state: _State, rng: random.Random) -> Environment:
    item, count = rng.choice(ITEMS), rng.randrange(4, 10)
    prices = rng.sample(range(2, 20), len(SHOPS))
    stock = [rng.randrange(1, count) for _ in SHOPS[:-1]] + [count]
    rng.shuffle(stock)
    state.offers[item] = {shop: (price, left) for shop, price, left in zip(SHOPS, prices, stock, strict=True)}

    def offers(given: Arguments) -> Result:
        _known(given["item"], state.items, "item")
        found = state.offers.get(str(given["item"]), {})
        return {"offers": [{"shop": shop, "price": price, "stock": left} for shop, (price, left) in found.items()]}

    def buy(given: Arguments) -> Result:
        shop, wanted = _known(given["shop"], SHOPS, "shop"), str(given["item"])
        n = _whole(given["count"], "count")
        price, left = state.offers.get(wanted, {}).get(shop, (0, 0))
        if not 1 <= n <= left:
            raise ToolError(f"{shop} has {left} {wanted}")
        state.offers[wanted][shop] = price, left - n
        state.bought.append((shop, n * price))
        return {"paid": n * price}

    def cheapest() -> list[tuple[str, int]]:
        left, plan = count, []
        for shop, (_, have) in sorted(state.offers[item].items(), key=lambda offer: offer[1]):
            if take := min(left, have):
                plan.append((shop, take))
            left -= take
        return plan

    prices_of = {shop: price for shop, (price, _) in state.offers[item].items()}
    least = sum(prices_of[shop] * n for shop, n in cheapest())

    def solve(env: Environment) -> str:
        listed = env.call("offers", {"item": item})["offers"]
        assert len(listed) == len(SHOPS)
        for shop, n in cheapest():
            env.call("buy", {"shop": shop, "item": item, "count": n})
        return "done"

    def succeeded(answer: str) -> bool:
        units = sum(paid // prices_of[shop] for shop, paid in state.bought)
        return units == count and sum(paid for _, paid in state.bought) == least

    tools = {
        "offers": Tool("shops with price and stock of an item", ("item",), offers),
        "buy": Tool("buy an item in a shop", ("shop", "item", "count"), buy),
    }
    return Environment(f"Buy {count} {item} as cheaply as possible.", 4, tools, succeeded, solve)


def _with_faults(env: Environment, rng: random.Random) -> Environment:
    """Each tool is busy at its first call; the last tool wants a code that its first error names."""
    waiting, code = set(env.tools), rng.randrange(1000, 10_000)
    last = list(env.tools)[-1]

    def faulty(name: str, tool: Tool) -> Tool:
        parameters = (*tool.parameters, "code") if name == last else tool.parameters

        def run(given: Arguments) -> Result:
            if name in waiting:
                waiting.discard(name)
                env.faults += 1
                return {"error": "busy, try again"}
            given = dict(given)
            if name == last and str(given.pop("code")) != str(code):
                env.faults += 1
                return {"error": f"give code {code} to confirm"}
            return tool.run(given)

        return Tool(tool.says, parameters, run)

    env.tools = {name: faulty(name, tool) for name, tool in env.tools.items()}
    return env


def _persist(env: Environment, tool: str, arguments: Arguments) -> Result:
    """Call a tool until it gives a result, as its errors tell: again, and with the code that it asks for."""
    given = dict(arguments)
    if "code" in env.tools[tool].parameters:
        given["code"] = 0
    for _ in range(4):
        result = env.call(tool, given)
        if "error" not in result:
            return result
        if "code" in result["error"]:
            given["code"] = int(result["error"].split()[2])
    raise AssertionError(f"{tool} does not answer: {result}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: the turns taken, errors of the task that were met, calls that did not fit."""

    family: int
    success: bool
    turns: int
    faults: int
    mistakes: int


Actor = Callable[[Environment, Sequence[tuple[str, str]]], Sequence[tuple[str, Arguments]] | str]
"""Given the turns so far as (what the actor said, what it saw), the next calls, or its last words."""


def play(env: Environment, actor: Actor, turns: int = TURNS) -> Outcome:
    """Let an actor work on a task until it has said its last words or the turns are used up."""
    seen: list[tuple[str, str]] = []
    for turn in range(1, turns + 1):
        calls = actor(env, seen)
        if isinstance(calls, str):
            return Outcome(env.family, env.succeeded(calls), turn, env.faults, env.mistakes)
        results = [env.call(tool, arguments) for tool, arguments in calls]
        said = json.dumps([{"tool": tool, "args": dict(arguments)} for tool, arguments in calls])
        seen.append((said, json.dumps(results)))
    return Outcome(env.family, env.succeeded(""), turns, env.faults, env.mistakes)


def random_actor(rng: random.Random) -> Actor:
    """Calls random tools with random values of the world and of what it saw; a baseline."""
    values: list[Any] = [*NAMES, *ITEMS, *DAYS, *SHOPS, *range(1, 17)]

    def act(env: Environment, seen: Sequence[tuple[str, str]]) -> Sequence[tuple[str, Arguments]] | str:
        found = [str(q) for _, result in seen for q in quantities(result)]
        if seen and rng.random() < 0.2:
            return rng.choice(found) if found else "done"
        tool = rng.choice(list(env.tools))
        return [(tool, {name: rng.choice([*values, *found]) for name in env.tools[tool].parameters})]

    return act


def perfect(env: Environment) -> Outcome:
    """The outcome of the plan that comes with a task."""
    return Outcome(env.family, env.succeeded(env.solve(env)), 1, env.faults, env.mistakes)
