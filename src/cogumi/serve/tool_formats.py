"""How tools are offered to a model, and how calls are read out of its answer.

A chat template that knows tools writes them itself, and the model answers in the format that it was trained on:
Hermes' tags (Qwen, Hermes, SmolLM3) or one JSON object (Llama 3). Any other model is asked in words, those of the
questions on which modifiers for tools are trained (`core.tool_wording`), so that such a modifier and its calibration
apply. A grammar makes every call one of an offered function with valid arguments.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cogumi.core.chat_template import knows_tools
from cogumi.core.tool_wording import tool_question
from cogumi.core.types import Message
from cogumi.engine.json_schema import lark_json
from cogumi.serve.tool_requests import CalledFunction, Offer

MOST_CALLS = 16
"""Most calls of an answer."""
SEVERAL = ", or a list of several"
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call in an answer: the name of the function and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat(ABC):
    """The format of one offer."""

    offer: Offer

    @abstractmethod
    def lark(self) -> str:
        """The grammar of an answer, for `Request.lark`."""

    @abstractmethod
    def read(self, text: str) -> tuple[str, list[Call]]:
        """The words of a complete answer, and its calls."""

    @abstractmethod
    def shown(self, text: str) -> int:
        """Characters of an unfinished answer that are words for certain."""

    def asked(self, content: str) -> str:
        """A user's message that offers the functions; by default the template offers them."""
        return content

    @property
    def tools(self) -> tuple[str, ...]:
        """`Request.tools`."""
        return tuple(one.model_dump_json(exclude_none=True) for one in self.offer.functions)


class Words(ToolFormat):
    """For a model whose template knows no tools."""

    tools = ()

    def asked(self, content: str) -> str:
        """The tools in words; several calls are mentioned on request only, because models are trained without."""
        functions = (one.words for one in self.offer.functions)
        return tool_question(functions, content, SEVERAL if self.offer.parallel else "")

    def lark(self) -> str:
        """One call or a list of calls, or words that begin otherwise."""
        schema = self.offer.schema("tool", "args", quoted=True)
        if self.offer.parallel is not False:
            calls = {"type": "array", "items": {"anyOf": schema["anyOf"]}, "minItems": 1, "maxItems": MOST_CALLS}
            schema = schema | {"anyOf": [*schema["anyOf"], calls]}
        return _either(schema, self.offer.required)

    def read(self, text: str) -> tuple[str, list[Call]]:
        """Calls have their arguments in their types."""
        found = _json(text)
        functions = {one.name: one for one in self.offer.functions}
        calls = [
            Call(one["tool"], _text(functions[one["tool"]].arguments(one["args"])))
            for one in (found if isinstance(found, list) else [found] if found else [])
        ]
        return ("" if calls else text), calls

    def shown(self, text: str) -> int:
        """Nothing while the answer may be a call."""
        return 0 if _may_be_json(text) else len(text)


class Llama3(ToolFormat):
    """One JSON object with `name` and `parameters`, instead of words."""

    def lark(self) -> str:
        """One call, or words that begin otherwise."""
        return _either(self.offer.schema("name", "parameters"), self.offer.required)

    def read(self, text: str) -> tuple[str, list[Call]]:
        """At most one call."""
        found = _json(text)
        return ("", [Call(found["name"], _text(found["parameters"]))]) if found else (text, [])

    def shown(self, text: str) -> int:
        """Nothing while the answer may be a call."""
        return 0 if _may_be_json(text) else len(text)


class Hermes(ToolFormat):
    """JSON objects with `name` and `arguments` between tags, after words or without."""

    def lark(self) -> str:
        """Words without a tag, or calls after words. The rule `opened` ends at the first tag, because it is lazy."""
        more = "(SPACE TAG SPACE json CLOSE)*" if self.offer.parallel is not False else ""
        calls = f"{'TAG' if self.offer.required else 'opened'} SPACE json CLOSE {more}"
        lines = [
            f"start: {calls if self.offer.required else f'TEXT | {calls}'}",
            r"SPACE: /[ \n]{0,2}/",
            f'TAG: "{_OPEN}"',
            rf"CLOSE: /[ \n]{{0,2}}<\/{_CLOSE[2:]}/",
            f"json: {lark_json(json.dumps(self.offer.schema('name', 'arguments')))}",
        ]
        if not self.offer.required:
            lines += [r"TEXT: /(.|\n)*/", rf"opened[lazy]: /(.|\n)*{_OPEN}/"]
        return "\n".join(lines)

    def read(self, text: str) -> tuple[str, list[Call]]:
        """The words before the first call, and all calls."""
        found = re.findall(f"{_OPEN}(.*?){_CLOSE}", text, re.DOTALL)
        calls = [json.loads(one) for one in found]
        words = text.partition(_OPEN)[0].strip() if calls else text
        return words, [Call(one["name"], _text(one["arguments"])) for one in calls]

    def shown(self, text: str) -> int:
        """All before the first tag, or before what may be its beginning."""
        at = text.find(_OPEN)
        if at < 0:
            held = (n for n in range(min(len(_OPEN), len(text)), 0, -1) if _OPEN.startswith(text[-n:]))
            at = len(text) - next(held, 0)
        return len(text[:at].rstrip())


def format_of(template: str | None, offer: Offer) -> ToolFormat:
    """The format for a model with this chat template."""
    if template is None or not knows_tools(template):
        return Words(offer)
    return Hermes(offer) if _OPEN in template else Llama3(offer) if '"parameters"' in template else Words(offer)


def earlier(template: str | None, content: str, calls: Sequence[CalledFunction]) -> Message:
    """An earlier answer with its calls: for the template, or as a model that is asked in words writes them."""
    if template is not None and knows_tools(template):
        texts = (json.dumps({"name": one.name, "arguments": _value(one.arguments)}) for one in calls)
        return Message("assistant", content, tuple(texts))
    values = [{"tool": one.name, "args": _value(one.arguments)} for one in calls]
    written = json.dumps(values[0] if len(values) == 1 else values, separators=(",", ":"), ensure_ascii=False)
    return Message("assistant", "\n".join(filter(None, [content, written])))


def result(template: str | None, name: str, content: str) -> Message:
    """The result of a call."""
    if template is not None and knows_tools(template):
        return Message("tool", content)
    return Message("user", f"{name} returned: {content}")


def _either(schema: dict[str, Any], required: bool) -> str:
    """The grammar of JSON of a schema, or of words that do not begin as JSON."""
    start = "json" if required else "TEXT | json"
    words = r"/([ \t\n]*[^{\[ \t\n](.|\n)*)?/"
    return f"start: {start}\n" + ("" if required else f"TEXT: {words}\n") + f"json: {lark_json(json.dumps(schema))}"


def _may_be_json(text: str) -> bool:
    return text.lstrip()[:1] in ("", "{", "[")


def _json(text: str) -> Any:
    """The JSON value that an answer is; None for words, or for an answer that was cut off."""
    if not text.strip() or not _may_be_json(text):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _value(arguments: str) -> Any:
    """Arguments of an earlier call; what is not JSON stays text."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


def _text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)
