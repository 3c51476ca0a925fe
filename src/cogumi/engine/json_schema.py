"""What the grammar of an answer may be.

Of JSON Schema, what no grammar keeps to is refused by name, never silently dropped. Of GBNF, what llama.cpp's parser
or its masks would not survive is refused before the call: the process would crash or stand still, and with it
everybody else's answers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cogumi.core.errors import RequestError

NOT_KEPT = frozenset(
    {
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
        *("minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties"),
        *("dependentRequired", "dependentSchemas", "dependencies", "not", "if", "then", "else"),
        *("pattern", "oneOf"),
    }
)
FORMATS = frozenset({"date", "time", "date-time", "uuid"})
LONGEST = 1000
"""Largest `maxLength` and the like, and repeat of a grammar; groups of a schema's grammar nest as deep as they are."""
LONGEST_GRAMMAR = 100_000
"""Characters of a grammar."""
DEEPEST = 1500
"""Groups within groups: llama.cpp's parser takes 3000 in 10 ms, 20,000 overrun its stack."""
MOST_EMPTY = 50
"""Parts in a row that may all be empty. The cost of a token grows with their cube: 50 take 0.1 s, 200 take 2 s."""
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_NOTES = frozenset(
    {"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment"}
)
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")


def check_schema(text: str) -> None:
    """Raise `RequestError` if a schema (JSON text) is no object, or asks for what a grammar does not keep to."""
    try:
        schema = json.loads(text)
        parts = list(_parts(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON text ({error}); correct it") from error
    if not isinstance(schema, dict):
        raise RequestError('the JSON schema must be an object, such as {"type": "object"}')
    for part in parts:
        problem = _problem(part)
        if problem:
            raise RequestError(f"the JSON schema uses {problem}, which an answer cannot be held to; leave it out")


def _problem(part: dict[str, Any]) -> str | None:
    """What of one schema the grammar would not keep to."""
    if found := NOT_KEPT & part.keys():
        return min(found)
    if part.get("format", "uuid") not in FORMATS:
        return f"format {part['format']!r}"
    for name in _COUNTS:
        if name in part and not (isinstance(part[name], int) and 0 <= part[name] <= LONGEST):
            return f"{name} {part[name]}"
    for least, most in (_COUNTS[:2], _COUNTS[2:]):
        if part.get(least, 0) > part.get(most, LONGEST):
            return f"{least} {part[least]} above {most} {part[most]}"
    alone = {"anyOf", "$ref"} & part.keys()
    if alone and part.keys() - alone - _NOTES:
        return f"{min(part.keys() - alone - _NOTES)} beside {min(alone)}"
    if {"enum", "const"} & part.keys() and part.keys() - {"enum", "const", "type"} - _NOTES:
        return "more beside enum or const"
    if isinstance(part.get("type"), list) and part.keys() - {"type"} - _NOTES:
        return "more beside a list of types"
    if {"minItems", "maxItems"} & part.keys() and not part.get("items"):
        return "minItems or maxItems without items"
    if "items" in part and not (isinstance(part["items"], dict) and part["items"]):
        return "items without a schema of their own"
    properties = part.get("properties", {})
    if not isinstance(properties, dict) or set(part.get("required", ())) - set(properties):
        return "required names that are no properties"
    for name, inner in properties.items():
        if not isinstance(inner, dict) or not name or '"' in name or "\\" in name:
            return f"property {name!r} in this form"
    return None


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas inside it; constants, names and examples are none."""
    if isinstance(value, list):
        for one in value:
            yield from _parts(one)
    if not isinstance(value, dict):
        return
    yield value
    for key, inner in value.items():
        if key in _SCHEMAS_BY_NAME and isinstance(inner, dict):
            yield from _parts(list(inner.values()))
        elif key not in ("const", "enum", "default", "examples"):
            yield from _parts(inner)


_TOKENS = re.compile(
    r"""\#[^\n]* | "(?:\\.|[^"\\])*"? | \[(?:\\.|[^\]\\])*\]?  # a comment, a literal, a class
    | [\w-]+\s*::= | [\w-]+ | \.  # a rule's beginning, its name elsewhere, any character
    | \{[^}]*\}? | [?*+()|]""",
    re.VERBOSE | re.DOTALL,
)


def check_grammar(text: str) -> None:
    """Raise `RequestError` for a grammar on which llama.cpp would run for ever or out of its stack."""
    if len(text) > LONGEST_GRAMMAR:
        raise RequestError(f"the grammar has {len(text)} characters; keep it below {LONGEST_GRAMMAR}")
    if not text.strip() or "\0" in text:
        raise RequestError("the grammar cannot be used (it is empty or holds a NUL); write GBNF with a rule named root")
    tokens = [token for token in _TOKENS.findall(text) if token[0] != "#"]
    depth = 0
    for token in tokens:
        depth = max(depth + (token == "(") - (token == ")"), 0)
        if depth > DEEPEST:
            raise RequestError(f"the grammar nests more than {DEEPEST} groups; flatten it")
        least, most = _times(token) if token[0] == "{" else (0, 0)
        if least > most:
            raise RequestError(f"the grammar repeats backwards ({token}); put the smaller number first")
        if max(least, most if most < math.inf else 0) > LONGEST:
            raise RequestError(f"the grammar repeats more than {LONGEST} times ({token}); ask for less")
    if _empty_in_a_row(tokens) > MOST_EMPTY:
        what = f"the grammar has more than {MOST_EMPTY} parts in a row that may all be empty"
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
