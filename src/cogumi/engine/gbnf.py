"""Checks GBNF text before llama.cpp parses it.

Some grammars crash that parser, and the process with it, or block it for minutes. They are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from cogumi.core.errors import RequestError

MAX_REPEATS = 1000
"""Largest number in a repetition such as `{2,1000}`; the parser expands every repetition."""
MAX_CHARACTERS = 100_000
"""Most characters of a grammar."""
MAX_DEPTH = 1500
"""Most nested groups: llama.cpp's parser handles 3000 in 10 ms; 20,000 overflow its stack."""
MAX_EMPTY = 50
"""Most consecutive parts that may be empty. The time per token grows with their cube: 0.1 s for 50, 2 s for 200."""

_TOKENS = re.compile(
    r"""\#[^\n]* | "(?:\\.|[^"\\])*"? | \[(?:\\.|[^\]\\])*\]?  # a comment, a literal, a class
    | [\w-]+\s*::= | [\w-]+ | \.  # the start of a rule, a reference to a rule, any character
    | \{[^}]*\}? | [?*+()|]""",
    re.VERBOSE | re.DOTALL,
)


def check_grammar(text: str) -> None:
    """Raise `RequestError` for a grammar that would block llama.cpp or overflow its stack."""
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"the grammar has {len(text)} characters; keep it below {MAX_CHARACTERS}")
    if not text.strip() or "\0" in text:
        raise RequestError("the grammar cannot be used (it is empty or holds a NUL); write GBNF with a rule named root")
    tokens = [token for token in _TOKENS.findall(text) if token[0] != "#"]
    depth = 0
    for token in tokens:
        depth = max(depth + (token == "(") - (token == ")"), 0)
        if depth > MAX_DEPTH:
            raise RequestError(f"the grammar nests more than {MAX_DEPTH} groups; flatten it")
        least, most = _times(token) if token[0] == "{" else (0, 0)
        if least > most:
            raise RequestError(
                f"the grammar has a repetition with swapped limits ({token}); put the smaller number first"
            )
        if max(least, most if most < math.inf else 0) > MAX_REPEATS:
            raise RequestError(f"the grammar repeats more than {MAX_REPEATS} times ({token}); use a smaller number")
    if _empty_in_a_row(tokens) > MAX_EMPTY:
        what = f"the grammar has more than {MAX_EMPTY} consecutive parts that may be empty"
        raise RequestError(f"{what}; repeat a non-empty part, such as x{{0,50}} instead of (x?){{50}}")


def _times(braces: str) -> tuple[float, float]:
    """Least and most repetitions of `{2,3}`, `{2}`, `{2,}` or `{,3}`."""
    least, comma, most = (part.strip() for part in braces[1:].rstrip("}").partition(","))
    low = float(least) if least.isdecimal() else 0.0
    return low, float(most) if most.isdecimal() else math.inf if comma else low


class _Part(NamedTuple):
    """Number of positions of the parser before the first character of a part, and whether the part may be empty."""

    places: float
    empty: bool

    def then(self, rest: _Part) -> _Part:
        """The part followed by `rest`."""
        return _Part(self.places + self.empty * rest.places, self.empty and rest.empty)

    def either(self, other: _Part) -> _Part:
        """One of two parts; the larger number of positions counts, because alternatives mostly start differently."""
        return _Part(max(self.places, other.places), self.empty or other.empty)

    def repeated(self, mark: str) -> _Part:
        """The part with `?`, `*`, `+` or a repetition in braces, which llama.cpp expands."""
        least, most = _times(mark) if mark[0] == "{" else (float(mark == "+"), math.inf)
        written = max(least, 1.0) if math.isinf(most) else most
        return _Part(self.places * written if self.empty else self.places, self.empty or least == 0)


def _empty_in_a_row(tokens: Sequence[str]) -> float:
    """Largest number of simultaneous positions of the parser, computed from right to left.

    A reference to a rule counts as one non-empty part, whatever the rule is.
    """
    nothing, never = _Part(0.0, True), _Part(0.0, False)
    worst, rest, others = 0.0, nothing, never  # the rest of an alternative, and the alternatives after it
    marks: list[str] = []  # repetition marks after the next part
    around: list[tuple[_Part, _Part, list[str]]] = []
    for token in reversed(tokens):
        if token[0] in "?*+{":
            marks.append(token)
        elif token == ")":
            around.append((rest, others, marks))
            rest, others, marks = nothing, never, []
        elif token == "|":
            rest, others = nothing, others.either(rest)
        elif token.endswith("::="):
            rest, others, around = nothing, never, []
        else:
            part = _Part(float(token != '""'), token == '""')
            if token == "(":
                part = rest.either(others)
                rest, others, marks = around.pop() if around else (nothing, never, [])
            for mark in reversed(marks):
                part = part.repeated(mark)
            rest, marks = part.then(rest), []
            worst = max(worst, rest.places)
    return worst
