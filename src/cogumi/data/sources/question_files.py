"""Reading a user's own question-answer files (SPEC A1) row by row, whatever their size.

A file is JSON Lines (one object per line) or one JSON array of objects. Each row is in one of two forms:

Alpaca    {"instruction": ..., "input": ... (optional), "output": ... (or "response")}
messages  {"messages": [{"role": ..., "content": ...}, ...]}; the last, an assistant's, is the answer

and may carry "domain", "difficulty" (1 to 5, 0 unknown) and "check" (see `grading.graders`). A row that
cannot be used is never fatal and never silent: it comes out as a `Rejected` with its line and the reason.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message
from cogumi.data.examples import example_id, to_line
from cogumi.grading.checks import check_problem

_ROLES = ("system", "user", "assistant")
_CHUNK = 1 << 16
_MARKS = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_OPENERS = {b"]": b"[", b"}": b"{"}


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be used; `line` is where it starts, from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def load(path: Path, domain: str = "general") -> tuple[list[Example], list[Rejected]]:
    """All usable rows of a file and all rejected ones; DataError if none is usable."""
    rows = list(iterate(path, domain))
    examples = [row for row in rows if isinstance(row, Example)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    if not examples:
        raise DataError(no_usable_row(str(path), len(rejected), rejected[0] if rejected else None))
    return examples, rejected


def no_usable_row(where: str, rejected: int, first: Rejected | None) -> str:
    """The message for input without a single example: how many rows were rejected, and the first of them."""
    if first is None:
        return f"{where} is empty: give a file with at least one row"
    return f"{where} has no usable row; {rejected} were rejected, the first is {first}"


def iterate(path: Path, domain: str = "general") -> Iterator[Example | Rejected]:
    """Stream a file: an `Example` or a `Rejected` for every row. `domain` is for rows that name none."""
    try:
        with open(path, "rb") as file:
            head = file.read(_CHUNK)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            for line, raw in _array_rows(file) if is_array else _lines(file):
                try:
                    yield _example(raw, domain, f"{path.name}:{line}")
                except (ValueError, RecursionError) as error:
                    yield Rejected(str(path), line, str(error))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every line that is not blank."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line.strip()


def _array_rows(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every element of a JSON array, holding one element and one chunk at a time.

    Elements are cut at commas outside strings and inner brackets, so a broken one seldom spoils the next.
    A missing element, or the missing end of the array, comes out as an empty text.
    """
    line, pending, quoted, after_comma = 1, b"", False, False
    brackets: list[bytes] = []
    while chunk := file.read(_CHUNK):
        while chunk.endswith(b"\\") and (following := file.read(1)):  # an escape stays in one piece
            chunk += following
        begin = 0
        for match in _MARKS.finditer(chunk):
            mark = match.group()
            if mark == b'"':
                quoted = not quoted
            if quoted or mark[:1] in b'"\\':
                continue
            if mark in _OPENERS.values():
                brackets.append(mark)
            elif mark in _OPENERS and _OPENERS[mark] in brackets:
                while brackets.pop() != _OPENERS[mark]:  # what a broken element left open ends with it
                    pass
            if (len(brackets) == 1 and mark in b"[,") or (not brackets and mark == b"]"):
                text = pending + chunk[begin : match.start()]
                if text.strip() or mark == b"," or after_comma:
                    yield line + _leading_lines(text), text.strip()
                line, pending, begin, after_comma = line + text.count(b"\n"), b"", match.end(), mark == b","
        pending += chunk[begin:]
    if pending.strip():
        yield line + _leading_lines(pending), pending.strip()
    if brackets:
        yield line + pending.count(b"\n"), b""


def _leading_lines(text: bytes) -> int:
    return text[: len(text) - len(text.lstrip())].count(b"\n")


def _example(raw: bytes, domain: str, source: str) -> Example:
    """The example of one row; ValueError or RecursionError says why there is none."""
    if not raw:
        raise ValueError("a row is missing here: a comma too many, or the file is cut off")
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    messages, answer = _from_messages(row["messages"]) if "messages" in row else _from_alpaca(row)
    domain, difficulty = row.get("domain", domain), row.get("difficulty", 0)
    if not isinstance(domain, str) or not domain:
        raise ValueError("domain must be a text")
    if type(difficulty) is not int or not 0 <= difficulty <= 5:
        raise ValueError("difficulty must be a whole number from 0 (unknown) to 5")
    check = row.get("check")
    if check is not None and (problem := check_problem(check)):
        raise ValueError(problem)
    meta = {} if check is None else {"check": check}
    example = Example(example_id(domain, messages), domain, difficulty, messages, answer, source, meta)
    try:
        to_line(example).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair: no tokenizer can read that") from error
    return example


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing or not a text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def _from_alpaca(row: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    if "instruction" not in row:
        raise ValueError("neither 'messages' nor 'instruction' in this row")
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    answer = _text(row.get("output", row.get("response")), "output")
    return (Message("user", question),), answer


def _from_messages(turns: Any) -> tuple[tuple[Message, ...], str]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages must be a list of objects with role and content")
    roles = [turn.get("role") for turn in turns]
    for role in roles:
        if role not in _ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(_ROLES)}")
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError("messages must end with a user's turn and the assistant's answer to it")
    messages = tuple(Message(turn["role"], _text(turn.get("content"), "content")) for turn in turns)
    return messages[:-1], messages[-1].content
