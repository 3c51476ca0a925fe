"""What of JSON Schema the grammar of an answer keeps to. The rest is refused by name, never silently dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cogumi.errors import RequestError

NOT_KEPT = frozenset(
    {
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
        *("minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties"),
        *("dependentRequired", "dependentSchemas", "not", "if", "then", "else"),
    }
)
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")


def check_schema(text: str) -> None:
    """Raise `RequestError` if a schema (JSON text) is no object, or asks for what a grammar does not keep to."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RequestError(f"the JSON schema is no JSON ({error})") from error
    if not isinstance(schema, dict):
        raise RequestError('the JSON schema must be an object, such as {"type": "object"}')
    for part in _parts(schema):
        if found := NOT_KEPT & part.keys():
            raise RequestError(f"the JSON schema uses {min(found)}, which an answer cannot be held to; leave it out")


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
