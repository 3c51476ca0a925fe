"""OpenAI's function tools: offered in words, so that every model can be asked; calls are read out of its answer.

The words are those of the questions on which modifiers for tools are trained (`core.tool_wording`), so that such a
modifier and its calibration apply. A grammar makes every call one of an offered tool with valid arguments. The words
ask for texts as values, so numbers and truth values may be written as texts; the client gets them in their type.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from cogumi.core.tool_wording import tool_question

MOST_TOOLS, MOST_CALLS = 128, 16
"""Most tools of a request, and most calls of an answer."""
SEVERAL = ", or a list of several"
IN_QUOTES: Mapping[str, str] = {
    "integer": r"^(0|-?[1-9][0-9]{0,14})$",
    "number": r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?$",
    "boolean": "^(true|false)$",
}
"""Types of values that may be written as texts, with the pattern of such a text, which is also JSON."""


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
        given = self.parameters or {"type": "object", "properties": {}}
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

    @property
    def value(self) -> dict[str, Any]:
        """The call as a model writes it; arguments that are not JSON stay text."""
        try:
            arguments: Any = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = self.arguments
        return {"tool": self.name, "args": arguments}


class ToolCall(BaseModel):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Offer(NamedTuple):
    """The functions that an answer may call, or must if `required`; several calls unless `parallel` is False.

    The words mention several calls only if `parallel` is True: models are trained without the mention.
    """

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

    def asked(self, content: str) -> str:
        """A user's message with the tools in words."""
        return tool_question((one.words for one in self.functions), content, SEVERAL if self.parallel else "")

    @property
    def schema(self) -> str:
        """The JSON schema of an answer that calls, as text."""
        schemas = {}
        for i, one in enumerate(self.functions):
            schemas[f"arguments{i}"] = _moved(one.written_schema, f"arguments{i}")
        calls = [
            {
                "type": "object",
                "properties": {"tool": {"const": one.name}, "args": {"$ref": f"#/$defs/arguments{i}"}},
                "required": ["tool", "args"],
                "additionalProperties": False,
            }
            for i, one in enumerate(self.functions)
        ]
        if self.parallel is not False:
            several = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MOST_CALLS}
            return json.dumps({"anyOf": [*calls, several], "$defs": schemas})
        return json.dumps({"anyOf": calls, "$defs": schemas})

    def calls(self, text: str) -> list[dict[str, Any]]:
        """The `tool_calls` of an answer; empty for one in words, or one that was cut off."""
        if not begins_call(text):
            return []
        try:
            value = json.loads(text)
        except ValueError:
            return []
        functions, found = {one.name: one for one in self.functions}, []
        for call in value if isinstance(value, list) else [value]:
            arguments = json.dumps(functions[call["tool"]].arguments(call["args"]), ensure_ascii=False)
            function = {"name": call["tool"], "arguments": arguments}
            found.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return found


def begins_call(text: str) -> bool:
    """Whether an answer begins as a call does, so that the grammar has made it one."""
    return text.lstrip()[:1] in ("{", "[")


def written(calls: Sequence[ToolCall]) -> str:
    """The calls of an earlier answer as a model writes them."""
    values = [call.function.value for call in calls]
    return json.dumps(values[0] if len(values) == 1 else values, separators=(",", ":"), ensure_ascii=False)


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
