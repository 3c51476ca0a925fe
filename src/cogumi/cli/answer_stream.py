"""Prints an answer while it is generated: in a terminal as Markdown, elsewhere as the plain text."""

from __future__ import annotations

import re
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from cogumi.cli.console import STDOUT, printable
from cogumi.engine.presentation import PROGRAM, as_markdown

FENCE = re.compile(r" {0,3}(```|~~~)")
_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def finished(text: str) -> int:
    """The number of characters at the beginning of an unfinished Markdown text that later text cannot change.

    These are whole blocks: they end at an empty line that is neither inside a fence nor followed by an indented line,
    which could continue a list.
    """
    done, at, fence = 0, 0, ""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        at += len(line)
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        following = lines[number + 1] if number + 1 < len(lines) else " "
        if not fence and not line.strip() and not following[0].isspace() and not _lists(following):
            done = at
    return done


def _lists(line: str) -> bool:
    """Whether a line is, or may become, an item of a list: a list with empty lines between its items is one block."""
    return re.match(r"([-*+]|\d+[.)])\s|([-*+]|\d+[.)]?)$", line) is not None


def rendered(block: str) -> Markdown:
    """Markdown for the terminal: line breaks of the text stay, links show their address."""
    text = as_markdown(block)
    text = text if FENCE.search(text) else _BREAK.sub("  \n", text)
    return Markdown(text, hyperlinks=False, code_theme="ansi_dark")


class AnswerStream:
    """A context in which the pieces of an answer are added.

    In a terminal a finished block is printed as Markdown; what may still change is shown below it as plain text.
    """

    def __init__(self, console: Console = STDOUT) -> None:
        self._console, self._text, self._shown = console, "", 0
        live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")
        self._live = live if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._print(len(self._text))

    def add(self, piece: str) -> None:
        """Show the next piece."""
        piece = printable(piece)
        if self._live is None:
            print(piece, end="", flush=True)
            return
        self._text += piece
        if not PROGRAM.match(self._text):
            self._print(self._shown + finished(self._text[self._shown :]))
        tail = self._text[self._shown :].split("\n")[-self._console.height + 1 :]
        self._live.update(Text("\n".join(tail)), refresh=True)

    def _print(self, end: int) -> None:
        block, self._shown = self._text[self._shown : end].strip("\n"), end
        if block:
            self._console.print(rendered(block))
