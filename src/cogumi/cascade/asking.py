"""Python interface to ask an engine: text or messages as input, streamed answers, conversations (SPEC M7)."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from typing import Any, Protocol, TypeAlias, cast

from cogumi.cascade.disclaimers import without_disclaimer
from cogumi.cascade.memory.personal_offsets import PersonalRouting
from cogumi.core.errors import ContextError, RequestError
from cogumi.core.registry import nearest
from cogumi.core.types import Message, Reply, Request
from cogumi.engine.protocol import Engine, Event, missing_reply
from cogumi.engine.stream_text import text_delta

Input: TypeAlias = str | Message | Mapping[str, str] | Sequence[Message | Mapping[str, str]]
"""A user's message as text, or a conversation: `Message`s or mappings with `role` and `content`."""

OPTIONS = tuple(field.name for field in fields(Request) if field.name not in ("messages", "prompt"))
ROLES = ("system", "user", "assistant")


def as_request(question: Input | Request, options: Mapping[str, Any]) -> Request:
    """Make a request from `question` and `options` (fields of `Request`); a missing id is generated.

    Raises `RequestError` for an unknown option, an empty conversation, or an invalid message.
    """
    for name in options:
        if name not in OPTIONS:
            raise RequestError(f"unknown option '{name}'; {nearest(name, OPTIONS)}")
    if isinstance(question, Request):
        request = replace(question, **options)
    else:
        request = Request(messages=_messages(question), **options)
    return request if request.id else replace(request, id=uuid.uuid4().hex)


def _messages(question: Input) -> tuple[Message, ...]:
    if isinstance(question, str):
        return (Message("user", question),)
    if isinstance(question, (Message, Mapping)):
        question = (question,)
    messages = tuple(map(_message, question))
    if not messages:
        raise RequestError("there are no messages; give a question as text, or at least one message")
    return messages


def _message(value: Message | Mapping[str, str]) -> Message:
    if isinstance(value, Mapping) and set(value) == {"role", "content"}:
        value = Message(value["role"], value["content"])
    if not isinstance(value, Message) or not isinstance(value.content, str):
        raise RequestError(f'{value!r} is not a message; write {{"role": "user", "content": "..."}}')
    if value.role not in ROLES:
        raise RequestError(f"unknown role '{value.role}'; use one of {', '.join(ROLES)}")
    return value


class Stream:
    """Iterator over the text of one answer while it is generated; `reply` is the whole answer.

    A revision that replaces the streamed text follows as a new paragraph. Closing the stream cancels the request.
    """

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self._text = ""
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        for event in self._events:
            piece, self._text = text_delta(self._text, event)
            if isinstance(event, Reply):
                self._reply = event
            if piece:
                yield piece

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the rest of the stream first."""
        for _ in self:
            pass
        if self._reply is None:
            raise missing_reply()
        return self._reply

    def close(self) -> None:
        """Cancel the request if it is still running."""
        close = getattr(self._events, "close", None)
        if close:
            close()


class RatedEngine(Engine, Protocol):
    """An engine that accepts ratings of its answers and supports personal routing."""

    def feedback(self, id: str, right: bool, user: str | None = None) -> None:
        """Record whether the answer `id` was right."""

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing (None: no change) and return its state."""


ANSWER_TOKENS = 256
"""Most tokens of an answer in a conversation."""


class Conversation:
    """A conversation: the turns so far, and the options of every question.

    A failed or cancelled turn is not stored, so that the conversation can continue. An answer has at most
    `ANSWER_TOKENS` tokens unless the options say otherwise, or as many as the context leaves if these are fewer: one
    long answer must not fill the context. `system` is a system prompt in place of the bundle's own. Raises
    `RequestError` for an unknown option.
    """

    def __init__(self, engine: RatedEngine, **options: Any) -> None:
        as_request("", options)
        self.options: dict[str, Any] = options
        self.system = ""
        self.messages: tuple[Message, ...] = ()
        self.id = ""
        self._engine = engine

    def ask(self, text: str) -> Reply:
        """Ask the next question and return the whole answer."""
        return self.stream(text).reply

    def stream(self, text: str) -> Stream:
        """Ask the next question and stream its answer; the turn is stored once the answer is complete."""
        asked = (*self.messages, Message("user", text))
        before = (Message("system", self.system),) if self.system else ()
        request = as_request((*before, *asked), {"max_tokens": ANSWER_TOKENS, **self.options})
        self.id = request.id or ""
        try:
            events = self._engine.generate(request)
        except ContextError:
            if "max_tokens" in self.options:
                raise
            request = replace(request, max_tokens=None)
            events = self._engine.generate(request)
        return Stream(self._remembering(asked, events))

    def _remembering(self, asked: tuple[Message, ...], events: Iterator[Event]) -> Iterator[Event]:
        with closing(cast(Generator[Event, None, None], events)):
            for event in events:
                if isinstance(event, Reply) and event.finish_reason != "cancelled":
                    self.messages = (*asked, Message("assistant", without_disclaimer(event.text)))
                yield event

    def rate(self, right: bool) -> None:
        """Record whether the last answer was right."""
        self._engine.feedback(self.id, right, self.options.get("user"))

    def personal(self, on: bool | None = None) -> PersonalRouting:
        """Switch the personal routing of this conversation's user (None: no change) and return its state."""
        return self._engine.personal(self.options.get("user") or "", on)

    def clear(self) -> None:
        """Delete the turns so far."""
        self.messages = ()
