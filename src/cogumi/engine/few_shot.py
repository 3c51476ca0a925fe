"""Worked examples that a request brings along (SPEC C9, F18): what they may be, and how a model is shown them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Message, Request

MOST = 10
"""Examples of one request."""
ADAPTER = ".fewshot"
"""Name of the adapter that goes with an adapted head; no modifier can have it, and no request may ask for it."""


def check_examples(request: Request) -> None:
    """Raise `RequestError` for examples that are none, or that no question follows."""
    examples = request.examples
    if len(examples) > MOST:
        raise RequestError(f"{len(examples)} examples are too many; give up to {MOST}")
    for i, example in enumerate(examples):
        if not (isinstance(example, tuple) and len(example) == 2 and all(isinstance(text, str) for text in example)):
            raise RequestError(f"example {i} is no pair of texts; give (question, answer)")
        if not all(text.strip() for text in example):
            raise RequestError(f"example {i} has an empty question or answer; give both")
    if examples and (request.prompt is not None or not request.messages):
        raise RequestError("examples belong before a question; give messages instead of a prompt")
    if request.adapt and not examples:
        raise RequestError("there is nothing to adapt to; give examples")


def in_context(request: Request) -> Request:
    """The request with its examples as earlier turns; `RequestError` if it insists on an adapted head."""
    check_examples(request)
    if request.adapt:
        raise RequestError("no head can be adapted here; leave out adapt to show the examples in the prompt")
    return replace(with_turns(request, request.examples), examples=(), adapt=None)


def with_turns(request: Request, pairs: Sequence[tuple[str, str]]) -> Request:
    """The request with questions and answers as turns before its last message."""
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return replace(request, messages=(*request.messages[:-1], *turns, *request.messages[-1:]))


def worked(request: Request, example: tuple[str, str]) -> tuple[Request, str]:
    """An example as a request of its own, under the same instructions, and its answer."""
    question, answer = example
    instructions = tuple(message for message in request.messages if message.role == "system")
    return Request(messages=(*instructions, Message("user", question))), answer


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Domain ("" where a line names none), question and answer of each line of a JSON-lines file; empty lines pass.

    Raises `CogumiError` with the number of a line that is none.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise CogumiError(f"{path} cannot be read: {error.strerror}; name a file of examples") from error
    except UnicodeDecodeError as error:
        raise CogumiError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield str(row.get("domain", "")), str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = 'is no example; write {"question": "...", "answer": "..."}'
            raise CogumiError(f"{path}: line {number} {what}") from error
