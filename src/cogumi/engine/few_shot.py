"""Few-shot examples of a request (SPEC C9, F18): validation, and how they are put into the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Message, Request

MAX_EXAMPLES = 10
"""Maximum number of examples in one request."""
ADAPTER = ".fewshot"
"""Reserved name of the adapter used with an adapted head; not a valid modifier name, not available to requests."""


def check_examples(request: Request) -> None:
    """Raise `RequestError` for invalid examples, or examples without a question."""
    examples = request.examples
    if len(examples) > MAX_EXAMPLES:
        raise RequestError(f"{len(examples)} examples are too many; give up to {MAX_EXAMPLES}")
    for i, example in enumerate(examples):
        if not (isinstance(example, tuple) and len(example) == 2 and all(isinstance(text, str) for text in example)):
            raise RequestError(f"example {i} is not a pair of texts; give (question, answer)")
        if not all(text.strip() for text in example):
            raise RequestError(f"example {i} has an empty question or answer; give both")
    if examples and (request.prompt is not None or not request.messages):
        raise RequestError("examples need chat messages; give messages instead of a prompt")
    if request.adapt and not examples:
        raise RequestError("adapt is set, but the request has no examples; give examples")


def in_context(request: Request) -> Request:
    """The request with its examples as earlier turns; `RequestError` if it requires an adapted head."""
    check_examples(request)
    if request.adapt:
        raise RequestError("this model has no adaptable head; leave out adapt to show the examples in the prompt")
    return replace(with_turns(request, request.examples), examples=(), adapt=None)


def with_turns(request: Request, pairs: Sequence[tuple[str, str]]) -> Request:
    """The request with (question, answer) pairs inserted as turns before its last message."""
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return replace(request, messages=(*request.messages[:-1], *turns, *request.messages[-1:]))


def example_request(request: Request, example: tuple[str, str]) -> tuple[Request, str]:
    """An example as a separate request with the same system messages, and its answer."""
    question, answer = example
    instructions = tuple(message for message in request.messages if message.role == "system")
    return Request(messages=(*instructions, Message("user", question))), answer


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Domain (default ""), question and answer of each line of a JSON-lines file; empty lines are skipped.

    Raises `CogumiError` with the number of an invalid line.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise CogumiError(f"{path} cannot be read: {error.strerror}; give a file of examples") from error
    except UnicodeDecodeError as error:
        raise CogumiError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield str(row.get("domain", "")), str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = 'is not an example; write {"question": "...", "answer": "..."}'
            raise CogumiError(f"{path}: line {number} {problem}") from error
