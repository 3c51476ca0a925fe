"""A conversation with an engine in the terminal: keeps the turns, prints as answers come, obeys /commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from cogumi import show
from cogumi.cascade.modes import mode_of
from cogumi.errors import CogumiError, RequestError
from cogumi.runtime.engine import Engine
from cogumi.runtime.writing import further
from cogumi.types import Message, Reply, Request

HELP = """\
Type a question and press Enter. The conversation is remembered until /new.
  /mode NAME   answer in another mode, fast or accurate; /mode alone goes back to the usual one
  /new         forget the conversation
  /help        this text
  /quit        end (so does Ctrl-D)"""


class Conversation:
    """The turns so far and the mode they are answered in."""

    def __init__(self, engine: Engine, mode: str | None = None) -> None:
        self.engine, self.mode = engine, mode_of(mode).name
        self.messages: tuple[Message, ...] = ()

    def say(self, text: str, write: Callable[[str], None] = lambda piece: None) -> Reply:
        """Ask, pass the answer's text to `write` piece by piece, and return the reply.

        A turn that fails is not remembered, so that the conversation can go on.
        """
        from cogumi.cascade.cascade import without_note  # loads llama.cpp

        asked = (*self.messages, Message("user", text))
        so_far = ""
        for event in self.engine.generate(Request(messages=asked, mode=self.mode)):
            piece, so_far = further(so_far, event)
            if piece:
                write(piece)
            if isinstance(event, Reply):
                self.messages = (*asked, Message("assistant", without_note(event.text)))
                return event
        raise RuntimeError("an engine ended a generation without a Reply: a defect in that engine")


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
        reply = conversation.say(question, show.stream)
    except RequestError as error:
        show.print_error(CogumiError(f"{error} (/new forgets the conversation so far)"))
    else:
        show.print_reasons(reply)


def _command(conversation: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/mode":
        try:
            conversation.mode = mode_of(argument.strip() or None).name
        except RequestError as error:
            print(error)
        print(f"mode: {conversation.mode}")
    elif name == "/new":
        conversation.messages = ()
        print("a new conversation")
    elif name == "/help":
        print(HELP)
    else:
        print(f"there is no command {name}; /help lists them")
