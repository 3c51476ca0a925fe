"""A conversation in the terminal: prints answers as they come, obeys /commands."""

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
"""Whose memory a chat in the terminal has."""
HELP = """\
Type a question and press Enter. The conversation is remembered until /new.
  /mode NAME   answer in another mode: fast, balanced, accurate, ...; /mode alone lets each question choose
  /right       the last answer was right; /wrong, it was not (kept if the chat was started with --state)
  /personal on let your ratings change how sure answers are for you; /personal off, /personal alone shows it
  /new         forget the conversation
  /help        this text
  /quit        end (so does Ctrl-D)"""


def answer(conversation: Conversation, question: str) -> Reply:
    """Ask, write the answer to the screen as it comes, and return it."""
    stream = conversation.stream(question)
    for piece in stream:
        console.stream(piece)
    return stream.reply


def load_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Worked examples out of a file (see `read_pairs`); `CogumiError` if it holds none."""
    found = tuple((question, answer) for _, question, answer in read_pairs(path))
    if not found:
        raise CogumiError(f"{path} holds no example; write one JSON object a line")
    return found


def talk(conversation: Conversation, settings: Settings) -> None:
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
            _command(conversation, settings, line)
        elif line:
            _turn(conversation, line)


def _turn(conversation: Conversation, question: str) -> None:
    try:
        reply = answer(conversation, question)
    except RequestError as error:
        console.print_error(CogumiError(f"{error} (/new forgets the conversation so far)"))
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
            print("noted")
        except RequestError as error:
            print(error)
    elif name == "/personal":
        _personal(conversation, argument.strip())
    elif name == "/new":
        conversation.clear()
        print("a new conversation")
    elif name == "/help":
        print(HELP)
    else:
        print(f"there is no command {name}; /help lists them")


def _personal(conversation: Conversation, argument: str) -> None:
    if argument not in ("", "on", "off"):
        print("write /personal on, /personal off, or /personal alone")
        return
    try:
        console.print_personal(conversation.personal(argument == "on" if argument else None))
    except RequestError as error:
        print(error)
