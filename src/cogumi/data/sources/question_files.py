"""Reads a user's question-answer files row by row, in constant memory (SPEC A1).

A file is JSON Lines (one object per line) or one JSON array of objects. A row has one of three forms:

question  {"question": ..., "answer": ...}
Alpaca    {"instruction": ..., "input": ... (optional), "output": ... (or "response")}; an "answer" that ends the output
          is the answer
messages  {"messages": [{"role": ..., "content": ...}, ...]}; the last turn, the assistant's, is the answer; or the last
          turn is the user's, and the answer is in "answer", as in the files of a build

and may have "domain", "difficulty" (a level from 1 to 5; 0, null or absent: no level) and "check" (see
`grading.graders`), in the row or in its "meta". An unusable row does not stop reading; it is returned as a `Rejected`
with its line and the reason. Columns that are not used are counted.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message
from cogumi.data.examples import example_id, to_line
from cogumi.grading.checks import check_problem

USED = ("id", "domain", "difficulty", "check", "meta", "source")
"""Columns that a row of any form may have; `id` and `source` are replaced by those of the file's row."""
_ROLES = ("system", "user", "assistant")
_CHUNK = 1 << 16
_MARKS = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_OPENERS = {b"]": b"[", b"}": b"{"}


@dataclass(frozen=True, slots=True)
class Rejected:
    """An unusable row; `line` is its first line, counted from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def load(path: Path, domain: str = "general") -> tuple[list[Example], list[Rejected]]:
    """All usable and all rejected rows of a file; DataError if none is usable."""
    rows = list(iterate(path, domain))
    examples = [row for row in rows if isinstance(row, Example)]
    rejected = [row for row in rows if isinstance(row, Rejected)]
    if not examples:
        raise DataError(no_usable_row(str(path), len(rejected), rejected[0] if rejected else None))
    return examples, rejected


def no_usable_row(where: str, rejected: int, first: Rejected | None) -> str:
    """The message for input without a usable row: the number of rejected rows, and the first of them."""
    if first is None:
        return f"{where} is empty: give a file with at least one row"
    return (
        f"{where} has no usable row; {rejected} were rejected, the first is {first}; rows are JSON objects in "
        "UTF-8, one a line or all in one array: docs/your-data.md shows their forms"
    )


def iterate(path: Path, domain: str = "general", unused: Counter[str] | None = None) -> Iterator[Example | Rejected]:
    """Stream a file: an `Example` or a `Rejected` for every row. `domain` is the default for rows without one.

    `unused` counts the rows of each column that is not used.
    """
    counted: Counter[str] = Counter() if unused is None else unused
    try:
        with open(path, "rb") as file:
            head = file.read(_CHUNK)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            for line, raw in _array_rows(file) if is_array else _lines(file):
                try:
                    yield _example(raw, domain, f"{path.name}:{line}", counted)
                except (ValueError, RecursionError) as error:
                    yield Rejected(str(path), line, str(error))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every non-blank line."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line.strip()


def _array_rows(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, text) of every element of a JSON array, with one element and one chunk in memory at a time.

    The array is split at commas outside strings and inner brackets, so that an invalid element rarely affects the
    next. A missing element, or the missing end of the array, gives an empty text.
    """
    line, pending, quoted, after_comma = 1, b"", False, False
    brackets: list[bytes] = []
    while chunk := file.read(_CHUNK):
        while chunk.endswith(b"\\") and (following := file.read(1)):  # do not split an escape sequence
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
                while brackets.pop() != _OPENERS[mark]:  # close brackets that an invalid element left open
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


def _example(raw: bytes, domain: str, source: str, unused: Counter[str]) -> Example:
    """The example of one row; ValueError or RecursionError with the reason if the row is unusable."""
    if not raw:
        raise ValueError("a row is missing here: an extra comma, or the file is truncated")
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    messages, answer, used = _question_and_answer(row)
    domain, difficulty = row.get("domain", domain), row.get("difficulty") or 0
    if not isinstance(domain, str) or not domain:
        raise ValueError("domain must be a non-empty string")
    if type(difficulty) is not int or not 0 <= difficulty <= 5:
        raise ValueError("difficulty must be a whole number from 1 to 5, or 0 without a level")
    meta = _meta(row)
    example = Example(example_id(domain, messages), domain, difficulty, messages, answer, source, meta)
    try:
        to_line(example).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an unpaired surrogate, which cannot be encoded as UTF-8") from error
    unused.update(name for name in row if name not in (*USED, *used))
    return example


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `meta` with its valid check, which may also be a column of its own."""
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise ValueError("meta must be an object")
    check = row.get("check") or meta.get("check")
    if check is not None and (problem := check_problem(check)):
        raise ValueError(problem)
    rest = {name: value for name, value in meta.items() if name != "check"}
    return rest if check is None else rest | {"check": check}


def _question_and_answer(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, tuple[str, ...]]:
    """The conversation up to the question, the answer, and the columns that hold them."""
    if "messages" in row:
        if "answer" not in row:
            return *_from_messages(row["messages"]), ("messages",)
        turns = row["messages"] if isinstance(row["messages"], list) else []
        return *_from_messages([*turns, {"role": "assistant", "content": row["answer"]}]), ("messages", "answer")
    if "question" in row and "instruction" not in row:
        question, answer = _text(row["question"], "question"), _text(row.get("answer"), "answer")
        return (Message("user", question),), answer, ("question", "answer")
    return *_from_alpaca(row), ("instruction", "input", "output" if "output" in row else "response", *_short(row))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing or not a string")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def _from_alpaca(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    if "instruction" not in row:
        raise ValueError("the row has none of 'question', 'instruction' and 'messages'")
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    answer = _text(row.get("output", row.get("response")), "output")
    return (Message("user", question),), str(row["answer"]) if _short(row) else answer


def _short(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The column "answer" if it is the end of the output: the answer that "the correct answer is B" states."""
    answer, output = row.get("answer"), row.get("output")
    if isinstance(answer, str) and isinstance(output, str) and answer and output.strip().rstrip(".").endswith(answer):
        return ("answer",)
    return ()


def _from_messages(turns: Any) -> tuple[tuple[Message, ...], str]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages must be a list of objects with role and content")
    roles = [turn.get("role") for turn in turns]
    for role in roles:
        if role not in _ROLES:
            raise ValueError(f"role {role!r} is not one of {', '.join(_ROLES)}")
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError("messages must end with a user's turn and the assistant's answer to it")
    messages = tuple(Message(turn["role"], _text(turn.get("content"), "content")) for turn in turns)
    return messages[:-1], messages[-1].content
