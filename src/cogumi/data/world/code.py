"""Small Python functions, checked by executing them.

1  one operation on a number                2  one operation on a list
3  two operations on a number, in order     4  a list filtered and changed
5  a list filtered twice, changed and summed up
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from cogumi.data.world.task import Maker, Task, Wording

UNANSWERABLE: Mapping[str, Maker] = {}

_FUNCTIONS = ("f", "g", "h", "run", "solve", "calc", "work", "apply")
_NUMBERS = ("x", "n", "a", "k", "v")
_LISTS = ("xs", "items", "nums", "data", "rows")
_QUESTIONS: Mapping[Wording, tuple[str, ...]] = {
    "terse": ("Write {f}({a}) that {s}.", "Define {f}({a}): it {s}.", "Code {f}({a}) which {s}."),
    "natural": (
        "Write a Python function {f}({a}) that {s}.",
        "I need a Python function {f}({a}) that {s}.",
        "Define a Python function named {f} with the argument {a}; it {s}.",
    ),
}
_RESULT: Mapping[Wording, str] = {"terse": "", "natural": " and returns the result"}
_KEPT: Mapping[Wording, str] = {
    "terse": "{l} that are {kept}, {changed}",
    "natural": "numbers in {l} that are {kept}, each {changed}",
}

# description with x, description as a second step, Python expression
_OPERATIONS = (
    ("adds {c} to {x}", "adds {c}", "{x} + {c}"),
    ("subtracts {c} from {x}", "subtracts {c}", "{x} - {c}"),
    ("multiplies {x} by {c}", "multiplies by {c}", "{x} * {c}"),
)
_LIST_OPERATIONS = (
    ("the sum of {l}", "sum({l})"),
    ("the largest of {l}", "max({l})"),
    ("the smallest of {l}", "min({l})"),
    ("the length of {l}", "len({l})"),
    ("{l} sorted", "sorted({l})"),
    ("{l} reversed", "{l}[::-1]"),
    ("the first {c} of {l}", "{l}[:{c}]"),
    ("the last {c} of {l}", "{l}[-{c}:]"),
    ("how often {c} is in {l}", "{l}.count({c})"),
)
_FILTERS = (("even", "x % 2 == 0"), ("odd", "x % 2 == 1"), ("above {c}", "x > {c}"), ("below {c}", "x < {c}"))
_CHANGES = (("doubled", "x * 2"), ("squared", "x ** 2"), ("plus {c}", "x + {c}"), ("times {c}", "x * {c}"))
_TOTALS = ("sum", "len")
_TOTAL_WORDS: Mapping[Wording, Mapping[str, str]] = {
    "terse": {"sum": "sum", "len": "length"},
    "natural": {"sum": "sum", "len": "count"},
}


def _task(
    argument: str, description: str, body: str, samples: Sequence[Any], rng: random.Random, wording: Wording
) -> Task:
    name = rng.choice(_FUNCTIONS)
    code = f"def {name}({argument}):\n    return {body}"
    scope: dict[str, Any] = {}
    exec(code, scope)  # our own templates, no model output
    tests = [f"assert {name}({sample!r}) == {scope[name](sample)!r}" for sample in samples]
    question = rng.choice(_QUESTIONS[wording]).format(f=name, a=argument, s=description)
    return Task(question, code, {"kind": "code", "tests": tests})


def _fill(pair: tuple[str, str], c: int, xs: str) -> tuple[str, str]:
    description, code = pair
    return description.format(c=c, l=xs), code.format(c=c, l=xs)


def _on_number(steps: int, rng: random.Random, wording: Wording) -> Task:
    x = rng.choice(_NUMBERS)
    first, *rest = rng.sample(_OPERATIONS, steps)
    c = rng.randint(2, 60 if steps == 1 else 9)
    description, body = first[0].format(x=x, c=c), first[2].format(x=x, c=c)
    for _, then, code in rest:
        d = rng.randint(2, 9)
        description, body = f"{description}, then {then.format(c=d)}", code.format(x=f"({body})", c=d)
    return _task(x, description + _RESULT[wording], body, (0, 3, -7, 12), rng, wording)


def _on_list(filters: int, rng: random.Random, wording: Wording) -> Task:
    xs = rng.choice(_LISTS)
    samples = [[rng.randint(-9, 30) for _ in range(8)] for _ in range(3)] + [[4, 5, 4]]
    if filters == 0:
        description, body = _fill(rng.choice(_LIST_OPERATIONS), rng.randint(1, 5), xs)
        return _task(xs, f"returns {description}", body, samples, rng, wording)
    kept = [_fill(chosen, rng.randint(2, 9), xs) for chosen in rng.sample(_FILTERS, filters)]
    changed, change = _fill(rng.choice(_CHANGES), rng.randint(2, 9), xs)
    description = _KEPT[wording].format(l=xs, kept=" and ".join(s for s, _ in kept), changed=changed)
    body = f"{change} for x in {xs} if {' and '.join(b for _, b in kept)}"
    if filters == 1:
        return _task(xs, f"returns the {description}", f"[{body}]", samples, rng, wording)
    total = rng.choice(_TOTALS)
    word = _TOTAL_WORDS[wording][total]
    return _task(xs, f"returns the {word} of the {description}", f"{total}([{body}])", samples, rng, wording)


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A function described in words, with the asserts it must pass."""
    if difficulty in (1, 3):
        return _on_number(1 if difficulty == 1 else 2, rng, wording)
    return _on_list({2: 0, 4: 1, 5: 2}[difficulty], rng, wording)
