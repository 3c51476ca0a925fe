"""Differential testing: compare a program with the reference answer on random inputs beyond the given tests.

A few asserts accept some wrong programs: `x < 7` for "below 6" if no test contains a 6. So the numbers in the tests'
calls are replaced by random ones many times, and candidate and reference must agree on every call. If the reference
returns the same result for all inputs, it cannot separate right from wrong programs; then every candidate is rejected.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence

from cogumi.core.types import Example
from cogumi.grading.programs import programs
from cogumi.grading.sandbox import Program

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


class _RandomNumbers(ast.NodeTransformer):
    """Replaces every integer in a call's arguments by a random one from 0 to `largest`; signs stay."""

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


def differential_test(example: Example, code: str, count: int) -> Program | None:
    """A program for the sandbox that ends without an error if `code` agrees with the answer on `count` new inputs.

    None if the tests contain no call with an integer.
    """
    tested = calls(example.check["tests"])
    numbers = [
        n.value
        for _, arguments in tested
        for n in ast.walk(arguments)
        if isinstance(n, ast.Constant) and type(n.value) is int
    ]
    if not numbers:
        return None
    rng = random.Random(example.id)
    largest = max(*numbers, 9)
    cases = []
    for _ in range(count):
        name, arguments = rng.choice(tested)
        copy = ast.parse(ast.unparse(arguments), mode="eval").body
        cases.append(f"({name!r}, {ast.unparse(_RandomNumbers(largest, rng).visit(copy))})")
    comparison = _PROGRAM.format(cases=f"[{', '.join(cases)}]", reference=programs(example.answer)[0], candidate=code)
    return Program("", comparison)
