"""OpenAI's function tools: the tools of a request, and what may be called. `tool_formats` offers and reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

MOST_TOOLS = 128
"""Most tools of a request."""
IN_QUOTES: Mapping[str, str] = {
    "integer": r"^(0|-?[1-9][0-9]{0,14})$",
    "number": r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?$",
    "boolean": "^(true|false)$",
}
"""Types of values that may be written as texts, with the pattern of such a text, which is also JSON."""


NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class Function(BaseModel):
    """A function that the client can call, with a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def words(self) -> str:
        """The function with the names of its arguments: `map(city)`."""
        properties = (self.parameters or {}).get("properties")
        arguments = ", ".join(properties) if isinstance(properties, dict) else ""
        described = f" [{' '.join(self.description.split())}]" if self.description else ""
        return f"{self.name}({arguments}){described}"

    @property
    def quoted(self) -> dict[str, str]:
        """Arguments that may be written as texts -> their type: those of which the schema says nothing but a type."""
        properties = (self.parameters or {}).get("properties")
        known = properties.items() if isinstance(properties, dict) else ()
        notes = {"type", "title", "description"}
        plain = {name: one for name, one in known if isinstance(one, dict) and not one.keys() - notes}
        return {name: one["type"] for name, one in plain.items() if str(one.get("type")) in IN_QUOTES}

    @property
    def written_schema(self) -> dict[str, Any]:
        """The schema of the arguments as a model may write them."""
        given = self.parameters or NO_ARGUMENTS
        either: dict[str, Any] = {
            name: {"anyOf": [{"type": kind}, {"type": "string", "pattern": IN_QUOTES[kind]}]}
            for name, kind in self.quoted.items()
        }
        return given | {"properties": given["properties"] | either} if either else given

    def arguments(self, written: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call in their types."""
        typed = {name for name in self.quoted if isinstance(written.get(name), str)}
        return {name: json.loads(value) if name in typed else value for name, value in written.items()}


class Tool(BaseModel):
    """One entry of `tools`; only functions are supported."""

    type: Literal["function"]
    function: Function


class _Named(BaseModel):
    name: str


class NamedChoice(BaseModel):
    """A `tool_choice` that names one function."""

    type: Literal["function"]
    function: _Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class CalledFunction(BaseModel):
    """A called function, with its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Offer(NamedTuple):
    """The functions that an answer may call, or must if `required`; several calls unless `parallel` is False."""

    functions: tuple[Function, ...]
    required: bool
    parallel: bool | None

    @staticmethod
    def of(tools: Sequence[Tool], choice: ToolChoice, parallel: bool | None) -> Offer | None:
        """The offer of a request; None if no function may be called. `ValueError` for a choice that is not offered."""
        functions = {tool.function.name: tool.function for tool in tools}
        if len(functions) < len(tools):
            raise ValueError("two tools have the same name; give each its own")
        if isinstance(choice, NamedChoice):
            if choice.function.name not in functions:
                raise ValueError(f"tool_choice names {choice.function.name!r}, which is not among the tools")
            return Offer((functions[choice.function.name],), True, parallel)
        if choice == "required" and not functions:
            raise ValueError("tool_choice is required, but there are no tools; give some")
        if not functions or choice == "none":
            return None
        return Offer(tuple(functions.values()), choice == "required", parallel)

    def schema(self, name: str, arguments: str, quoted: bool = False) -> dict[str, Any]:
        """The JSON schema of a call, an object with the keys `name` and `arguments`; see `Function.written_schema`."""
        definitions, calls = {}, []
        for i, one in enumerate(self.functions):
            schema = one.written_schema if quoted else one.parameters or NO_ARGUMENTS
            definitions[f"arguments{i}"] = _moved(schema, f"arguments{i}")
            call = {name: {"const": one.name}, arguments: {"$ref": f"#/$defs/arguments{i}"}}
            calls.append({"type": "object", "properties": call, "required": [*call], "additionalProperties": False})
        return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, name: str) -> Any:
    """The schema as part of another, at `#/$defs/<name>`: its references point there."""
    if isinstance(schema, list):
        return [_moved(one, name) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, name) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{reference[1:]}"
    return moved
