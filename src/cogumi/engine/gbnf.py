"""Checks GBNF text before llama.cpp's parser gets it.

Some grammars crash that parser or keep it busy for minutes, and the whole process with it. They are refused here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from cogumi.core.errors import RequestError

MAX_REPEATS = 1000
"""Largest number in a repeat such as `{2,1000}`; the parser writes out every repetition."""
MAX_CHARACTERS = 100_000
"""Length of a grammar."""
MAX_DEPTH = 1500
"""Groups within groups: llama.cpp's parser takes 3000 in 10 ms, 20,000 overrun its stack."""
MAX_EMPTY = 50
"""Consecutive parts that may all be empty. The cost of a token grows with their cube: 50 take 0.1 s, 200 take 2 s."""

_TOKENS = re.compile(
    r"""\#[^\n]* | "(?:\\.|[^"\\])*"? | \[(?:\\.|[^\]\\])*\]?  # a comment, a literal, a class
    | [\w-]+\s*::= | [\w-]+ | \.  # a rule's beginning, its name elsewhere, any character
    | \{[^}]*\}? | [?*+()|]""",
    re.VERBOSE | re.DOTALL,
)


def check_grammar(text: str) -> None:
    """Raise `RequestError` for a grammar on which llama.cpp would run for ever or out of its stack."""
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
            raise RequestError(f"the grammar repeats backwards ({token}); put the smaller number first")
        if max(least, most if most < math.inf else 0) > MAX_REPEATS:
            raise RequestError(f"the grammar repeats more than {MAX_REPEATS} times ({token}); ask for less")
    if _empty_in_a_row(tokens) > MAX_EMPTY:
        what = f"the grammar has more than {MAX_EMPTY} parts in a row that may all be empty"
        raise RequestError(f"{what}; repeat something that may not, such as x{{0,50}} instead of (x?){{50}}")


def _times(braces: str) -> tuple[float, float]:
    """Least and most times of `{2,3}`, `{2}`, `{2,}` or `{,3}`."""
    least, comma, most = (part.strip() for part in braces[1:].rstrip("}").partition(","))
    low = float(least) if least.isdecimal() else 0.0
    return low, float(most) if most.isdecimal() else math.inf if comma else low


class _Part(NamedTuple):
    """At how many places a parser may stand before it reads a character of a part, and whether it may read none."""

    places: float
    empty: bool

    def then(self, rest: _Part) -> _Part:
        """The part, and what follows it."""
        return _Part(self.places + self.empty * rest.places, self.empty and rest.empty)

    def either(self, other: _Part) -> _Part:
        """One of two parts; alternatives mostly begin unlike each other, so the wider one counts."""
        return _Part(max(self.places, other.places), self.empty or other.empty)

    def repeated(self, mark: str) -> _Part:
        """The part under `?`, `*`, `+` or a repeat in braces, which llama.cpp writes out."""
        least, most = _times(mark) if mark[0] == "{" else (float(mark == "+"), math.inf)
        written = max(least, 1.0) if math.isinf(most) else most
        return _Part(self.places * written if self.empty else self.places, self.empty or least == 0)


def _empty_in_a_row(tokens: Sequence[str]) -> float:
    """Most places at which the parser may stand at once, read from the right.

    A rule's name counts as one part that is not empty, whatever the rule says.
    """
    nothing, never = _Part(0.0, True), _Part(0.0, False)
    worst, rest, others = 0.0, nothing, never  # the rest of an alternative, and the alternatives behind it
    marks: list[str] = []  # behind the part that comes next
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
