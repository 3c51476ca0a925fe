"""A conversation in the terminal: streams answers and executes /commands."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
  /why             show why the last answer is sure or not: every decision, its value and its threshold
  /mode NAME       answer in this mode: fast, balanced, accurate, ...; auto: one per question; without NAME, show it
  /right, /wrong   rate the last answer (needs a chat started with --state)
  /personal on     let your ratings adjust the confidence for you; /personal off stops it, /personal shows it
  /new             start a new conversation
  /help            show this text
  /quit            end the chat (also Ctrl-D, or Ctrl-C at the prompt; during an answer Ctrl-C cancels it)"""
ENDED = "chat ended"


def answer(conversation: Conversation, question: str) -> Reply:
    """Ask a question, print the answer while it is generated, and return it. Ctrl-C cancels the request."""
    stream, wrap = conversation.stream(question), console.Wrap(console.width())
    try:
        for piece in stream:
            console.stream(wrap.add(piece))
    except KeyboardInterrupt:
        stream.close()
        raise
    finally:
        console.stream(wrap.end())
    return stream.reply


def topics(classes: Sequence[str]) -> tuple[str, ...]:
    """The domains among the classes of a bundle's router."""
    return tuple(sorted(name for name in classes if name != "base"))


def banner(title: str, topics: Sequence[str]) -> str:
    """The first line of a chat: the bundle's title and the topics that it was built for."""
    about = f": questions about {', '.join(topics[:-1])}{' and ' if topics[1:] else ''}{topics[-1]}" if topics else ""
    return title + about


def load_examples(path: Path) -> tuple[tuple[str, str], ...]:
    """Worked examples from a file (see `read_pairs`); `CogumiError` if it is empty."""
    found = tuple((question, answer) for _, question, answer in read_pairs(path))
    if not found:
        raise CogumiError(f"{path} holds no example; write one JSON object per line")
    return found


def chat_loop(conversation: Conversation, settings: Settings, title: str = "", topics: Sequence[str] = ()) -> None:
    """Read questions and commands from the keyboard until end of input, /quit, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):  # line editing and history, if the platform has it
        import readline  # noqa: F401
    if title:
        print(banner(title, topics) + "\n")
    print(HELP)
    last: Reply | None = None
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(f"\n{ENDED}")
            return
        if line == "/quit":
            print(ENDED)
            return
        if line == "/why":
            console.print_reasons(last) if last else print("there is no answer yet")
        elif line.startswith("/"):
            _command(conversation, settings, line)
        elif line:
            last = _turn(conversation, line) or last


def _turn(conversation: Conversation, question: str) -> Reply | None:
    """Answer a question; None if it was refused or cancelled."""
    try:
        reply = answer(conversation, question)
    except RequestError as error:
        console.print_error(CogumiError(f"{error} (/new starts a new conversation)"))
        return None
    except KeyboardInterrupt:
        print("\n  answer cancelled (Ctrl-C again ends the chat)")
        return None
    console.print_verdict(reply)
    return reply


def _mode(conversation: Conversation, settings: Settings, chosen: str) -> None:
    try:
        settings.check(chosen or None)
        if chosen:
            conversation.options["mode"] = None if chosen == AUTO else chosen
    except RequestError as error:
        print(error)
    print(f"mode: {conversation.options.get('mode') or AUTO} (of {', '.join((AUTO, *settings.names))})")


def _command(conversation: Conversation, settings: Settings, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/mode":
        _mode(conversation, settings, argument.strip())
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
