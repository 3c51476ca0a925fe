"""A conversation in the terminal: streams answers and executes /commands."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cogumi.cascade.asking import Conversation
from cogumi.cascade.modes import AUTO, Settings
from cogumi.cli import console
from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Reply
from cogumi.engine.few_shot import read_pairs

USER = "local"
"""User id of a chat in the terminal, for memory and ratings."""
HELP = """\
Type a question and press Enter. The conversation continues until /new.
  /mode NAME       answer in this mode: fast, balanced, accurate, ...; without NAME, choose one per question
  /right, /wrong   rate the last answer (needs a chat started with --state)
  /personal on     let your ratings adjust the confidence for you; /personal off stops it, /personal shows it
  /new             start a new conversation
  /help            show this text
  /quit            end the chat (also Ctrl-D)"""


def answer(conversation: Conversation, question: str) -> Reply:
    """Ask a question, print the answer while it is generated, and return it."""
    stream = conversation.stream(question)
    for piece in stream:
        console.stream(piece)
    return stream.reply


def load_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Worked examples from a file (see `read_pairs`); `CogumiError` if it is empty."""
    found = tuple((question, answer) for _, question, answer in read_pairs(path))
    if not found:
        raise CogumiError(f"{path} holds no example; write one JSON object per line")
    return found


def chat_loop(conversation: Conversation, settings: Settings) -> None:
    """Read questions and commands from the keyboard until end of input or /quit."""
    with contextlib.suppress(ImportError):  # line editing and history, if the platform has it
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
            _command(conversation, settings, line)
        elif line:
            _turn(conversation, line)


def _turn(conversation: Conversation, question: str) -> None:
    try:
        reply = answer(conversation, question)
    except RequestError as error:
        console.print_error(CogumiError(f"{error} (/new starts a new conversation)"))
    else:
        console.print_reasons(reply)


def _command(conversation: Conversation, settings: Settings, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/mode":
        chosen = argument.strip() or None
        try:
            settings.check(chosen)
            conversation.options["mode"] = chosen
        except RequestError as error:
            print(error)
        print(f"mode: {conversation.options['mode'] or AUTO}")
    elif name in ("/right", "/wrong"):
        try:
            conversation.rate(name == "/right")
            print("rating saved")
        except RequestError as error:
            print(error)
    elif name == "/personal":
        _personal(conversation, argument.strip())
    elif name == "/new":
        conversation.clear()
        print("new conversation")
    elif name == "/help":
        print(HELP)
    else:
        print(f"unknown command {name}; /help lists all commands")


def _personal(conversation: Conversation, argument: str) -> None:
    if argument not in ("", "on", "off"):
        print("use /personal on, /personal off, or /personal")
        return
    try:
        console.print_personal(conversation.personal(argument == "on" if argument else None))
    except RequestError as error:
        print(error)
