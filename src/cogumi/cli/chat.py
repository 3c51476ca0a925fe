"""A conversation with an engine in the terminal: keeps the turns, prints as answers come, obeys /commands."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cogumi.cascade.disclaimers import without_note
from cogumi.cascade.modes import AUTO, Settings
from cogumi.cli import console
from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Message, Reply, Request
from cogumi.engine.few_shot import read_pairs
from cogumi.engine.protocol import Engine, missing_reply
from cogumi.engine.stream_text import text_delta

USER = "local"
"""Whose memory a chat in the terminal has."""
HELP = """\
Type a question and press Enter. The conversation is remembered until /new.
  /mode NAME   answer in another mode: fast, balanced, accurate, ...; /mode alone lets each question choose
  /right       the last answer was right; /wrong, it was not (kept if the chat was started with --state)
  /new         forget the conversation
  /help        this text
  /quit        end (so does Ctrl-D)"""


class Rated(Engine, Protocol):
    """An engine whose answers can be rated."""

    def feedback(self, id: str, user: str | None, right: bool) -> None:
        """Take note of whether the answer of that id was right."""


class Conversation:
    """The turns so far and the mode they are answered in (None: each question chooses), all after `examples`.

    Raises `RequestError` for a mode that `settings` does not know.
    """

    def __init__(
        self,
        engine: Rated,
        mode: str | None = None,
        settings: Settings | None = None,
        examples: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.engine, self.settings, self.examples = engine, settings or Settings(), examples
        self.choose(mode)
        self.id = ""
        self.messages: tuple[Message, ...] = ()

    def choose(self, mode: str | None) -> None:
        """Answer in that mode from now on."""
        self.settings.check(mode)
        self.mode = mode

    def rate(self, right: bool) -> None:
        """Say whether the last answer was right."""
        self.engine.feedback(self.id, USER, right)

    def say(self, text: str, write: Callable[[str], None] = lambda piece: None) -> Reply:
        """Ask, pass the answer's text to `write` piece by piece, and return the reply.

        A turn that fails is not remembered, so that the conversation can go on.
        """
        asked = (*self.messages, Message("user", text))
        so_far, self.id = "", uuid.uuid4().hex
        request = Request(messages=asked, mode=self.mode, user=USER, id=self.id, examples=self.examples)
        for event in self.engine.generate(request):
            piece, so_far = text_delta(so_far, event)
            if piece:
                write(piece)
            if isinstance(event, Reply):
                self.messages = (*asked, Message("assistant", without_note(event.text)))
                return event
        raise missing_reply()


def load_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Worked examples out of a file (see `read_pairs`); `CogumiError` if it holds none."""
    found = tuple((question, answer) for _, question, answer in read_pairs(path))
    if not found:
        raise CogumiError(f"{path} holds no example; write one JSON object a line")
    return found


def talk(conversation: Conversation) -> None:
    """Read questions and commands from the keyboard until the end of input or /quit."""
    with contextlib.suppress(ImportError):  # line editing and history, where the platform has it
        import readline  # noqa: F401
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            _turn(conversation, line)


def _turn(conversation: Conversation, question: str) -> None:
    try:
        reply = conversation.say(question, console.stream)
    except RequestError as error:
        console.print_error(CogumiError(f"{error} (/new forgets the conversation so far)"))
    else:
        console.print_reasons(reply)


def _command(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/mode":
        try:
            conversation.choose(argument.strip() or None)
        except RequestError as error:
            print(error)
        print(f"mode: {conversation.mode or AUTO}")
    elif name in ("/right", "/wrong"):
        try:
            conversation.rate(name == "/right")
            print("noted")
        except RequestError as error:
            print(error)
    elif name == "/new":
        conversation.messages = ()
        print("a new conversation")
    elif name == "/help":
        print(HELP)
    else:
        print(f"there is no command {name}; /help lists them")
