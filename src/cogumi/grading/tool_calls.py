"""Tool calls in an output, whatever shape they have, and their comparison with the right ones (SPEC B3).

Read are {"tool", "args"}, {"name", "arguments" or "parameters"}, OpenAI's {"function": {"name", "arguments": "<JSON>"}}
alone, in a list or under "tool_calls", Hermes' <tool_call> tags, Markdown fences, and JSON inside prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from cogumi.core.text import without_thinking

MOST = 64
"""Calls of the longest answer that is compared; a longer one is wrong."""
_NAMES, _ARGUMENTS = ("tool", "name", "function"), ("args", "arguments", "parameters")
_BFCL_IGNORES = re.compile(r"[ ,./\-_*^]")
_START = re.compile(r"[{\[]")
_JSON_BEGINS = re.compile(r'[{\[](?:\s{0,9}[{\[]){0,9}\s{0,9}"')


class Call(NamedTuple):
    """One call: the name of the tool and its arguments."""

    tool: str
    arguments: Mapping[str, Any]


def calls_in(output: str) -> list[Call]:
    """All calls of an output, in order. Raises `ValueError` if it has JSON that looks like a call but is none."""
    text = without_thinking(output)
    found: list[Call] = []
    for value in _values(text):
        found += _calls(value)
    return found


def calls_of(value: Any) -> list[Call]:
    """The calls of a parsed value. Raises `ValueError` if it is not one call or a list of calls."""
    found = _calls(value)
    if not found and value != []:
        raise ValueError('it is no call: give {"tool": name, "args": {...}}, or a list of them')
    return found


def same_calls(found: Sequence[Call], wanted: Sequence[Call], ordered: bool = True) -> bool:
    """Whether two lists hold the same calls, in the same order if `ordered`."""
    return _matched(
        found,
        wanted,
        ordered,
        lambda one, other: one.tool == other.tool and same_json(dict(one.arguments), dict(other.arguments)),
    )


Possible = Mapping[str, Mapping[str, Sequence[Any]]]
"""BFCL's form of a right call: {tool: {argument: [possible value, ...]}}."""


def allowed(found: Sequence[Call], possible: Sequence[Possible], ordered: bool) -> bool:
    """Whether calls are among those that BFCL allows: for each call its tool and the values of each argument.

    An argument that may be "" may be left out. Strings are compared as BFCL does, without spaces and punctuation.
    """
    wanted = [Call(tool, values) for call in possible for tool, values in call.items()]
    return _matched(found, wanted, ordered, _fits)


def _matched(found: Sequence[Call], wanted: Sequence[Call], ordered: bool, fits: Any) -> bool:
    if len(found) != len(wanted) or len(found) > MOST:
        return False
    if ordered:
        return all(fits(one, other) for one, other in zip(found, wanted, strict=True))
    return _assigned([[fits(one, other) for other in wanted] for one in found])


def _assigned(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether every row can have a column of its own that fits it (augmenting paths, Kuhn 1955)."""
    owner: dict[int, int] = {}

    def placed(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or placed(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return all(placed(row, set()) for row in range(len(fits)))


def same_json(left: Any, right: Any) -> bool:
    """JSON equality: key order is ignored, 1 equals 1.0, but true differs from 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _values(text: str) -> Iterator[Any]:
    """The JSON objects and lists of a text; other text between them is skipped."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    at = 0
    while start := _START.search(text, at):
        try:
            value, at = decoder.raw_decode(text, start.start())
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        except ValueError as error:
            if _JSON_BEGINS.match(text, start.start()):  # brackets in prose have no quote after them
                raise ValueError(f"not JSON: {error}") from error
            at = start.end()
            continue
        yield value


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _calls(value: Any) -> list[Call]:
    if isinstance(value, list):
        return [call for part in value for call in _calls(part)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("tool_calls"), list):
        return _calls(value["tool_calls"])
    if isinstance(value.get("function"), dict):
        return _calls(value["function"])
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    if name is None:
        return []
    arguments: Any = next((value[key] for key in _ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}", parse_constant=_refuse_constant)
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} are no JSON object")
    return [Call(name, arguments)]


def _fits(call: Call, wanted: Call) -> bool:
    if call.tool != wanted.tool or not call.arguments.keys() <= wanted.arguments.keys():
        return False
    return all(
        any(_one_of(call.arguments[name], value) for value in values) if name in call.arguments else "" in values
        for name, values in ((name, as_list(values)) for name, values in wanted.arguments.items())
    )


def _one_of(value: Any, possible: Any) -> bool:
    """Whether a value equals a possible one, in which an object lists the possible values of each key."""
    if isinstance(value, str) and isinstance(possible, str):
        return _bfcl_text(value) == _bfcl_text(possible)
    if isinstance(value, dict) and isinstance(possible, dict):
        return _fits(Call("", value), Call("", possible))
    if isinstance(value, list) and isinstance(possible, list):
        return len(value) == len(possible) and all(map(_one_of, value, possible))
    return same_json(value, possible)


def as_list(values: Any) -> list[Any]:
    """The possible values; a few rows of BFCL have a value alone."""
    return values if isinstance(values, list) else [values]


def _bfcl_text(text: str) -> str:
    return _BFCL_IGNORES.sub("", text).lower().replace("'", '"')
