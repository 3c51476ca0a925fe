"""A conversation in the terminal: streams answers and executes /commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cogumi.cascade.asking import Conversation
from cogumi.cascade.modes import AUTO, Settings
from cogumi.cli import console
from cogumi.cli.answer_stream import AnswerStream
from cogumi.core.environment import cache_folder
from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.files import write_json, write_text
from cogumi.core.types import Reply
from cogumi.engine.few_shot import read_pairs
from cogumi.engine.presentation import transcript, verdict
from cogumi.engine.reply_extension import extension

USER = "local"
"""User id of a chat in the terminal, for memory and ratings."""
HELP = """\
Type a question and press Enter; for several lines put \"\"\" before the first and after the last.
The conversation continues until /new.
  /why             show why the last answer is sure or not: every decision with its threshold
  /mode NAME       answer in this mode: fast, balanced, accurate, ...; auto: one per question
  /right, /wrong   rate the last answer (needs a chat started with --state)
  /personal on     let your ratings adjust the confidence for you (off: no longer; alone: show it)
  /system TEXT     start anew with this system prompt, under which no answer is sure, because
                   calibration did not have it; /system alone removes it
  /save FILE       save the conversation as Markdown, or as JSON if the name ends in .json
  /new             start a new conversation
  /help            show this text
  /quit            end the chat (also Ctrl-D, or Ctrl-C at the prompt; Ctrl-C stops an answer)"""
ENDED = "chat ended"
QUOTES = '"""'
HISTORY = 1000
"""Lines that the history of the keyboard keeps."""
Turn = tuple[str, Reply]
"""A question and its answer."""


def answer(conversation: Conversation, question: str) -> Reply:
    """Ask a question, print the answer while it is generated, and return it. Ctrl-C cancels the request."""
    stream = conversation.stream(question)
    try:
        with AnswerStream() as shown:
            for piece in stream:
                shown.add(piece)
    except KeyboardInterrupt:
        stream.close()
        raise
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
    remember = _line_editing()
    if title:
        console.STDOUT.print(banner(title, topics) + "\n", markup=False)
    print(HELP)
    last: Reply | None = None
    turns: list[Turn] = []
    while True:
        try:
            line = read_question(input)
        except (EOFError, KeyboardInterrupt):
            print(f"\n{ENDED}")
            return
        remember()
        if line == "/quit":
            print(ENDED)
            return
        if line == "/why":
            console.print_reasons(last) if last else print("there is no answer yet")
        elif line.startswith("/"):
            _command(conversation, settings, line, turns)
        elif line and (reply := _turn(conversation, line)):
            last = reply
            turns.append((line, reply))


def read_question(read: Callable[[str], str]) -> str:
    """One line, or several between triple quotes. Raises EOFError at the end of the input."""
    line = read("\n> ").strip()
    if not line.startswith(QUOTES):
        return line
    text = line.removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + read("... ")
    return text.partition(QUOTES)[0].strip()


def _line_editing() -> Callable[[], None]:
    """Switch on line editing and a history that outlives the chat; returns what stores it after each line."""
    try:
        import readline
    except ImportError:  # not on every platform
        return lambda: None
    file = cache_folder() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY)

    def remember() -> None:
        if sys.stdin.isatty():  # what a script asks is no history
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                readline.write_history_file(file)

    return remember


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


def _command(conversation: Conversation, settings: Settings, line: str, turns: list[Turn]) -> None:
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
        turns.clear()
        print("new conversation")
    elif name == "/system":
        conversation.system = argument.strip()
        conversation.clear()
        turns.clear()
        print("new conversation, " + ("with this system prompt" if conversation.system else "without a system prompt"))
    elif name == "/save":
        _save(argument.strip(), turns)
    elif name == "/help":
        print(HELP)
    else:
        print(f"unknown command {name}; /help lists all commands")


def _save(name: str, turns: Sequence[Turn]) -> None:
    """Write the conversation to a new file."""
    if not name or not turns:
        print("there is no answer yet" if name else "name the file: /save talk.md, or talk.json")
        return
    path = Path(name).expanduser()
    if path.exists():
        print(f"{path} exists already; choose another name")
        return
    rows = [{"question": question, "answer": reply.text} | extension(reply) for question, reply in turns]
    told = [part for question, reply in turns for part in (("user", question, ""), _told(reply))]
    try:
        if path.suffix == ".json":
            write_json(path, rows)
        else:
            write_text(path, transcript("Conversation", told))
        print(f"saved to {path}")
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}")


def _told(reply: Reply) -> tuple[str, str, str]:
    return "assistant", reply.text, verdict(reply)


def _personal(conversation: Conversation, argument: str) -> None:
    if argument not in ("", "on", "off"):
        print("use /personal on, /personal off, or /personal")
        return
    try:
        console.print_personal(conversation.personal(argument == "on" if argument else None))
    except RequestError as error:
        print(error)
