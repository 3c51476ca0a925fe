"""What the forms of rows have in common: a question with its answer, and the pieces that questions are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogumi.core.types import Message

Row = Mapping[str, Any]

_NO_INPUT = re.compile(r"[\s<\[(]*no[\s_-]?input[\s>\])]*\.?", re.IGNORECASE)
_END_TOKENS = re.compile(r"\s*(?:<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|</s>)\s*\Z")


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversation up to the question, and the answer; `used` are the columns of the row that they come from."""

    messages: tuple[Message, ...]
    answer: str
    used: frozenset[str]
    check: Mapping[str, Any] | None = None
    rejected: str | None = None
    unused: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows: `fits` tells whether a row has it; `read` makes its pairs, or raises `ValueError`."""

    name: str
    shows: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], list[Pair]]


def text(value: Any, name: str) -> str:
    """A text that must not be empty; numbers and truth values are written out."""
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing or not a text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def answer_text(value: Any, name: str) -> str:
    """An answer, without the end tokens that some files keep."""
    return text(_END_TOKENS.sub("", value) if isinstance(value, str) else value, name)


def first_of(row: Row, names: Sequence[str]) -> str | None:
    """The first of some columns that has a value."""
    return next((name for name in names if row.get(name) not in (None, "", [])), None)


def passage_of(row: Row, names: Sequence[str]) -> tuple[str, str | None]:
    """The text that a question is about, and its column; empty for the ways to write that there is none."""
    name = first_of(row, names)
    if name is None:
        return "", None
    value = row[name]
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False)
    value = text(value, name) if not isinstance(value, str) or value.strip() else ""
    return ("" if _NO_INPUT.fullmatch(value) else value), name


def with_passage(question: str, passage: str) -> str:
    """A question followed by the text that it is about."""
    return f"{question}\n\n{passage}" if passage.strip() else question


def conversation(question: str, system: str = "", history: Any = None) -> tuple[Message, ...]:
    """The messages of a question, after its system prompt and the earlier turns [[question, answer], ...]."""
    messages = [Message("system", system)] if system.strip() else []
    for turn in history or ():
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError("history must be a list of [question, answer]")
        messages += [Message("user", text(turn[0], "history")), Message("assistant", text(turn[1], "history"))]
    return (*messages, Message("user", question))


def system_with_tools(system: str, tools: Any) -> str:
    """A system prompt that also lists the tools; `tools` is a list or its JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools is not JSON: {error}") from error
    if not tools:
        return system
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    lines = f'You can call these tools; answer with {{"name": ..., "arguments": ...}} to call one.\n{listed}'
    return f"{system}\n\n{lines}" if system.strip() else lines


def lettered(question: str, options: Sequence[str]) -> str:
    """A question with its options, one a line."""
    lines = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))
    return f"{question.rstrip()}\n\n{lines}\n\nAnswer with the letter of the right option."
