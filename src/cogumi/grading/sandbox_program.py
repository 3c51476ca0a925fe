"""Runs one program and its tests inside the sandbox: a script loaded by `sandbox_child`, standard library only.

A program runs in a thread of its own that C code starts, so that no Python frame of the sandbox is above its frames: it
cannot walk up to its verdict; nor can it set signal handlers, which need the main thread. Its tests run after it, with
`==` replaced by `equal`, which does not ask the objects of the program whether they are equal.
"""

import _queue
import _thread
import ast
import collections
import datetime
import decimal
import fractions
import itertools
import linecache
import operator
import secrets
import sys
import time
import traceback
import types
from typing import Any

EQUALITIES = tuple(
    kind.__eq__
    for kind in (object, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice,
                 collections.deque, collections.OrderedDict, collections.Counter, decimal.Decimal, fractions.Fraction,
                 datetime.date, datetime.datetime, datetime.time, datetime.timedelta, type(None), type({}.keys()),
                 type({}.items()), memoryview, types.MappingProxyType)
)  # fmt: skip
"""The comparisons that a program did not write, taken before any program runs."""
STACK_BYTES, MORE_STACK_BYTES = 16 << 20, 1 << 20
"""Stack of the thread of the program, and of those that it starts."""
POLL_SECONDS = 0.0005


def run_program(code: str, tests: str) -> str:
    """Run code and then its tests in a thread; returns why it failed, empty if both came to their end."""
    sources = {"<program>": code.lstrip("\ufeff"), "<tests>": tests}
    failures: list[str] = []
    compare = f"_{secrets.token_hex(8)}"
    begun: _queue.SimpleQueue[bool] = _queue.SimpleQueue()
    done: _queue.SimpleQueue[bool] = _queue.SimpleQueue()
    try:
        program = compile(sources["<program>"], "<program>", "exec")
        linecache.cache["<program>"] = len(code), None, sources["<program>"].splitlines(True), "<program>"
        checks = compile(with_comparison(tests, compare), "<tests>", "exec")
    except BaseException as error:
        return explain(error, sources)
    module = types.ModuleType("solution")  # not __main__: what a program does as a script is no part of its answer
    sys.modules["solution"] = module
    names = vars(module)
    explained, running, pause, thread = explain, _thread._count, time.sleep, collections.deque

    def failed(raised: Any) -> None:
        if raised.object is thread:  # else an exception in a destructor
            failures.append(explained(raised.exc_value, sources))

    sys.unraisablehook = failed
    steps = [
        (begun.put, True),
        (exec, program, names),
        (names.__setitem__, compare, equal),
        (exec, checks, names),
        (done.put, True),  # reached only if no step before it raised
    ]
    _thread.stack_size(STACK_BYTES)
    _thread.start_new_thread(thread, (itertools.starmap(operator.call, steps), 0))
    _thread.stack_size(MORE_STACK_BYTES)
    begun.get()  # from now on the thread is counted
    while done.empty():
        if failures:
            return failures[0]
        if not running() and done.empty():
            return failures[0] if failures else "left before its end through SystemExit"
        pause(POLL_SECONDS)
    return ""


class Comparisons(ast.NodeTransformer):
    """Replaces `one == other` and `one != other` by calls of the function `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """A comparison of two values."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        call = ast.Call(ast.Name(self.name, ast.Load()), [node.left, *node.comparators], [])
        return call if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), call)


def with_comparison(tests: str, name: str) -> ast.Module:
    """The tests with their comparisons by the function `name`."""
    tree: ast.Module = ast.fix_missing_locations(Comparisons(name).visit(ast.parse(tests)))
    return tree


def equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, without asking objects of the program unless both are of the same class of it."""
    if is_plain(one) and is_plain(other):
        return bool(one == other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def is_plain(value: Any) -> bool:
    """Whether a value and everything in it is compared by Python's own methods."""
    own = type.__getattribute__(type(value), "__eq__")
    if not any(own is known for known in EQUALITIES):
        return False
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return not isinstance(value, (list, tuple, set, frozenset, collections.deque)) or all(map(is_plain, value))


def explain(error: BaseException, sources: dict[str, str]) -> str:
    """One-line description of a failure, with the source line that raised."""
    if isinstance(error, SystemExit):
        return "left before its end through SystemExit"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in sources]
    message = traceback.format_exception_only(error)[-1].strip()
    lines = sources[frames[-1].filename].split("\n") if frames else []
    source = lines[frames[-1].lineno - 1].strip() if frames and frames[-1].lineno else ""
    return (f"{message} at: {source}" if source else message)[:400]
