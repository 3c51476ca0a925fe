"""What of JSON Schema the grammar of an answer keeps to. The rest is refused by name, never silently dropped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from cogumi.errors import RequestError

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
"""Largest `maxLength` and the like: llama.cpp's parser nests as deep as they are."""
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


LONGEST_GRAMMAR, DEEPEST, MOST_REPEATED = 100_000, 100, 1000
_REPEATS = re.compile(r"\{(\d*)(,?)(\d*)\}")


def check_grammar(text: str) -> None:
    """Raise `RequestError` for a grammar on which llama.cpp's parser would run for ever or out of its stack."""
    if len(text) > LONGEST_GRAMMAR:
        raise RequestError(f"the grammar has {len(text)} characters; keep it below {LONGEST_GRAMMAR}")
    if not text.strip() or "\0" in text:
        raise RequestError("the grammar cannot be used (it is empty or holds a NUL); write GBNF with a rule named root")
    depth = 0
    for character in text:
        depth = max(depth + (character == "(") - (character == ")"), 0)
        if depth > DEEPEST:
            raise RequestError(f"the grammar nests more than {DEEPEST} groups; flatten it")
    total = 0
    for least, _, most in _REPEATS.findall(text):
        total += max(int(least or 0), int(most or 0))
        if total > MOST_REPEATED or (least and most and int(least) > int(most)):
            raise RequestError(f"the grammar repeats more than {MOST_REPEATED} times, or backwards; ask for less")
