"""Programs that pass their tests by luck: compare them with the reference answer on inputs that no test has.

A handful of asserts lets wrong programs through: `x < 7` for "below 6" where no test holds a 6. So the numbers in the
tests' calls are drawn anew many times, and candidate and reference must agree on all of it. A reference that gives one
and the same result everywhere tells no right program from a wrong one; then no candidate counts as right.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence

from cogumi.core.text import strip_fences
from cogumi.core.types import Example

_PROGRAM = """
import copy
reference, candidate, seen = {{}}, {{}}, set()
cases = {cases}
try:
    exec({reference!r}, reference)
except Exception:
    cases = []
exec({candidate!r}, candidate)
for name, arguments in cases:
    try:
        wanted = reference[name](*copy.deepcopy(arguments))
    except Exception:
        continue
    seen.add(repr(wanted))
    found = candidate[name](*copy.deepcopy(arguments))
    assert found == wanted, f"{{name}}{{arguments}} is {{wanted!r}}, not {{found!r}}"
assert len(seen) != 1, "the reference answers everything alike"
"""


class _Redrawn(ast.NodeTransformer):
    """Every whole number of a call's arguments drawn anew, from 0 up to the largest seen; signs stay."""

    def __init__(self, largest: int, rng: random.Random) -> None:
        self.largest, self.rng = largest, rng

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is not int:
            return node
        return ast.Constant(self.rng.randint(0, self.largest))


def calls(tests: Sequence[str]) -> list[tuple[str, ast.Tuple]]:
    """Function and arguments of each test of the form `assert f(...) == ...`."""
    found = []
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
                call = node.test.left
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords:
                    found.append((call.func.id, ast.Tuple(call.args, ast.Load())))
    return found


def probe(example: Example, output: str, count: int) -> str | None:
    """A program for the sandbox that ends without an error if `output` agrees with the answer on `count` new inputs.

    None if the tests hold no call with a whole number.
    """
    asked = calls(example.meta["check"]["tests"])
    numbers = [
        n.value
        for _, arguments in asked
        for n in ast.walk(arguments)
        if isinstance(n, ast.Constant) and type(n.value) is int
    ]
    if not numbers:
        return None
    rng = random.Random(example.id)
    largest = max(*numbers, 9)
    cases = []
    for _ in range(count):
        name, arguments = rng.choice(asked)
        copy = ast.parse(ast.unparse(arguments), mode="eval").body
        cases.append(f"({name!r}, {ast.unparse(_Redrawn(largest, rng).visit(copy))})")
    return _PROGRAM.format(
        cases=f"[{', '.join(cases)}]", reference=strip_fences(example.answer), candidate=strip_fences(output)
    )
