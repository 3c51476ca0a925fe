"""Money: prices, percentages, interest.

1  cost of several items                      2  change from a note
3  price after a rise or a discount           4  simple interest over years
5  growth in percent between two years of a table
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cogumi.data.world.task import NAMES, Maker, Task, Wording, no_answer, openings

_ITEMS = ("lamp", "chair", "book", "bag", "clock", "cup", "shirt", "hat", "ball", "pen")
_LINES = ("Sales", "Costs", "Profit", "Rent", "Wages", "Taxes")


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A question about money whose answer is a number."""
    question, value = (_cost, _change, _price, _interest, _growth)[difficulty - 1](rng)
    return Task(rng.choice(openings(wording)) + question, value, {"kind": "numeric"})


def _cost(rng: random.Random) -> tuple[str, str]:
    item, price, count = rng.choice(_ITEMS), rng.randrange(2, 60), rng.randrange(2, 12)
    return f"A {item} costs ${price}. How many dollars do {count} of them cost?", str(price * count)


def _change(rng: random.Random) -> tuple[str, str]:
    name, note = rng.choice(NAMES), rng.choice((10, 20, 50, 100))
    cents = rng.randrange(50, note * 100)
    change = note * 100 - cents
    spent, left = (f"{value // 100}.{value % 100:02}" for value in (cents, change))
    return f"{name} pays ${spent} with a ${note} note. How many dollars does {name} get back?", left


def _price(rng: random.Random) -> tuple[str, str]:
    item, price, percent = rng.choice(_ITEMS), 20 * rng.randrange(2, 50), 5 * rng.randrange(1, 16)
    rises = rng.random() < 0.5
    what = f"rises by {percent}%" if rises else f"is reduced by {percent}%"
    new = price * (100 + percent if rises else 100 - percent) // 100
    return f"The price of a {item}, ${price}, {what}. What is the new price in dollars?", str(new)


def _interest(rng: random.Random) -> tuple[str, str]:
    name, amount, percent, years = (
        rng.choice(NAMES),
        100 * rng.randrange(2, 60),
        rng.randrange(2, 9),
        rng.randrange(2, 6),
    )
    asked = f"{name} lends ${amount} at {percent}% simple interest per year for {years} years."
    return f"{asked} How many dollars of interest is that in all?", str(amount * percent * years // 100)


def _growth(rng: random.Random) -> tuple[str, str]:
    lines, year = rng.sample(_LINES, 3), rng.randrange(2001, 2030)
    before = {line: 100 * rng.randrange(2, 90) for line in lines}
    percents = {line: rng.choice([p for p in range(-60, 90) if p]) for line in lines}
    table = "\n".join(f"{line} | {n} | {n * (100 + percents[line]) // 100}" for line, n in before.items())
    asked = rng.choice(lines)
    question = f" | {year} | {year + 1}\n{table}\nBy how many percent did {asked} change from {year} to {year + 1}?"
    return f"{question} (negative if it fell)", str(percents[asked])


def _missing_price(rng: random.Random, wording: Wording = "terse") -> Task:
    """The cost of an item whose price is not given."""
    item, other = rng.sample(_ITEMS, 2)
    return no_answer(
        f"A {item} costs ${rng.randrange(2, 60)}. How many dollars do {rng.randrange(2, 12)} {other}s cost?"
    )


UNANSWERABLE: Mapping[str, Maker] = {"missing_price": _missing_price}
