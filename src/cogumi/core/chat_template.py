"""Renders chat messages through a model's own template, for training and serving alike (SPEC M1).

The template sees the contents as they are and renders them as transformers does. A user still cannot type a control
token: the name of one inside a content is broken by a mark before the template runs, the mark is taken out of the
pieces of plain text afterwards, and the control tokens of the result must be those that the template writes around
contents it cannot read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cogumi.core.errors import RequestError
from cogumi.core.types import Message

_PRIVATE = "\ue000"
"""A private-use character: no template and no name of a token contains it."""


class _Generation(Extension):
    """`{% generation %}` of transformers marks the text that is trained on; it renders its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _reject(message: str) -> None:
    raise ValueError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """The functions that transformers gives a template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _reject
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=16)
def _constants(source: str, controls: Controls) -> re.Pattern[str]:
    """The string constants of a template, which it may look for in a content (`'</think>' in content`).

    Those that are a part of a control token's name, or contain one, do not count: pieces of contents could be joined.
    """
    found = {node.value for node in _ENVIRONMENT.parse(source).find_all(nodes.Const) if isinstance(node.value, str)}
    read = [c for c in found if c and not any(c in name or name in c for name in controls.names)]
    return re.compile(f"({'|'.join(map(re.escape, sorted(read, key=len, reverse=True))) or '(?!)'})")


@dataclass(frozen=True)
class Controls:
    """The names of a vocabulary's control tokens, which only its template may write."""

    names: frozenset[str]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the longest name at a place. A name of one character cannot be broken, so it is never found."""
        names = sorted((name for name in self.names if len(name) > 1), key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def short(self) -> frozenset[str]:
        """The names of one character."""
        return frozenset(name for name in self.names if len(name) == 1)

    def broken(self, content: str, mark: str) -> str:
        """The content with the mark inside every name."""
        while self.pattern.search(content):
            content = self.pattern.sub(lambda name: name[0][0] + mark + name[0][1:], content)
        return content


def render_pieces(
    template: str,
    messages: Sequence[Message],
    controls: Controls,
    *,
    tools: Sequence[str] = (),
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
) -> list[tuple[str, bool]]:
    """Split a rendered chat into `(text, special)` pieces, in order; in `special` ones control tokens are read.

    If no content holds the name of a control token, the whole chat is one special piece.
    Raises `RequestError` if the template rejects the messages (for example because of an unknown role), and if it
    joins or changes contents so that they would form a control token.
    """
    given = _Given.of(messages, tools)
    texts = list(given.texts())
    if any(controls.pattern.search(name) for name in given.names()):
        raise RequestError("a tool has an argument named like a control token of the model; give it another name")
    mark = next(c for c in map(chr, range(ord(_PRIVATE), 0xF900)) if not any(c in content for content in texts))
    text = given.mapped(lambda content: controls.broken(content, mark)).render(
        template, add_generation_prompt, bos, eos
    )
    hidden = given.mapped(lambda content: _hide(content, template, controls))
    unread = hidden.render(template, add_generation_prompt, bos, eos)
    if controls.pattern.findall(text) != controls.pattern.findall(unread):
        raise RequestError(
            "the model's chat template joins or changes these messages so that they form a control token; "
            "leave names of control tokens, and parts of them, out of the messages"
        )
    if mark not in text and not any(name in text for name in controls.short):
        return [(text, True)] if text else []
    pieces: list[tuple[str, bool]] = []
    at = 0
    for match in controls.pattern.finditer(text):
        pieces += [(text[at : match.start()].replace(mark, ""), False), (match[0], True)]
        at = match.end()
    return [piece for piece in [*pieces, (text[at:].replace(mark, ""), False)] if piece[0]]


def closing_token(template: str | None, controls: Controls, *, bos: str = "", eos: str = "") -> str | None:
    """The name of the control token that the template writes right after an assistant's message; None if there is none.

    It is what ends an answer: the model has seen it after every answer of a conversation. A file's `eos` may be another
    token, the one that ends a text (`<|endoftext|>`), and a guess by a token's name may find one that is never written.
    """
    if template is None:
        return None
    try:
        chat = (Message("user", "u"), Message("assistant", _PRIVATE))
        text = _Given.of(chat, ()).render(template, False, bos, eos)
    except RequestError:
        return None
    _, found, rest = text.rpartition(_PRIVATE)
    match = controls.pattern.match(rest.lstrip()) if found else None
    return match[0] if match else None


@lru_cache(maxsize=16)
def knows_tools(template: str) -> bool:
    """Whether a template writes the tools that it is given. An invalid template knows none."""
    try:
        return "tools" in meta.find_undeclared_variables(_ENVIRONMENT.parse(template))
    except TemplateError:
        return False


@dataclass(frozen=True)
class _Given:
    """What a template is given: messages and tools as JSON values."""

    chat: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    @staticmethod
    def of(messages: Sequence[Message], tools: Sequence[str]) -> _Given:
        chat = []
        for message in messages:
            calls = [{"type": "function", "function": json.loads(call)} for call in message.calls]
            chat.append({"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {}))
        return _Given(chat, [{"type": "function", "function": json.loads(tool)} for tool in tools])

    def mapped(self, change: Callable[[str], str]) -> _Given:
        """The same with every text of a user or tool changed; roles stay."""

        def changed(value: Any) -> Any:
            if isinstance(value, str):
                return change(value)
            if isinstance(value, dict):
                return {key: changed(one) for key, one in value.items()}
            return [changed(one) for one in value] if isinstance(value, list) else value

        chat = [changed(message) | {"role": message["role"]} for message in self.chat]
        return _Given(chat, [changed(tool) for tool in self.tools])

    def texts(self) -> Iterator[str]:
        """Every text, and every name of a value."""
        found: list[str] = []

        def seen(text: str) -> str:
            found.append(text)
            return text

        self.mapped(seen)
        yield from found
        yield from self.names()

    def names(self) -> Iterator[str]:
        """The names of all values inside tools and calls."""
        rest: list[Any] = [*self.tools, *(message.get("tool_calls") for message in self.chat)]
        while rest:
            value = rest.pop()
            if isinstance(value, dict):
                yield from value
            if isinstance(value, (dict, list)):
                rest += value.values() if isinstance(value, dict) else value

    def render(self, template: str, add_generation_prompt: bool, bos: str, eos: str) -> str:
        """The rendered text; `RequestError` if the template rejects it."""
        try:
            return _compile(template).render(
                messages=self.chat,
                tools=self.tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=bos,
                eos_token=eos,
            )
        except Exception as error:  # a template is a program: whatever it raises means that it cannot render this
            raise RequestError(f"the model's chat template rejects these messages: {error}") from error


def _hide(content: str, template: str, controls: Controls) -> str:
    """The content with private-use characters in place of all that is neither white space nor a constant the template
    may look for.
    """
    parts = _constants(template, controls).split(content)
    return "".join(part if i % 2 else re.sub(r"\S", _PRIVATE, part) for i, part in enumerate(parts))
