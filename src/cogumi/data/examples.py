"""Examples on disk: one JSON object per line, in one pool or in one file per split.

An artifact of kind `pool` is a folder with `pool.jsonl`: examples that are not divided into sets yet. Stage `load`
makes one, steps that select or change examples turn a pool into a pool, and stage `split` makes the sets.

An artifact of kind `examples` is a folder with `<split>.jsonl` for every name in `SPLITS`. The five sets are
disjoint and have one purpose each (ARCHITECTURE, "Data discipline"): train; selection (early stopping,
hyper-parameters); fit (calibration); threshold (the guarantee); heldout (final report only).
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message

SPLITS = ("train", "selection", "fit", "threshold", "heldout")
POOL = "pool.jsonl"
SPLIT_GROUP = "split_group"
LICENCE = "licence"
"""Key of `meta`: rows with equal values stay in one split."""
NO_ANSWER, NO_LEVEL = "0", "none"
"""Keys of unanswerable questions, and of answerable ones without a difficulty, in tables by difficulty."""


def split_path(artifact: Path, split: str) -> Path:
    """The file of one split inside an `examples` artifact."""
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; use one of {', '.join(SPLITS)}")
    return artifact / f"{split}.jsonl"


def example_id(domain: str, messages: Sequence[Message]) -> str:
    """Deterministic id of a question: 16 hex digits of a hash of domain and prompt."""
    content = json.dumps([domain, [[m.role, m.content] for m in messages]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def normalised_question(messages: Sequence[Message]) -> str:
    """The prompt with case folded, white space collapsed and Unicode NFKC: the key for detecting duplicates."""
    return normalised_text("\n".join(m.content for m in messages if m.role != "system"))


def normalised_text(text: str) -> str:
    """A text with case folded, white space collapsed and Unicode NFKC."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_of(question: str, shares: Mapping[str, int], seed: int) -> str:
    """The split of a normalised question, by hash; `shares` are relative weights."""
    digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") % sum(shares.values())
    for name, share in shares.items():
        position -= share
        if position < 0:
            return name
    raise AssertionError("shares do not cover the hash range")


def is_easy(example: Example, easy_up_to: int, right: bool) -> bool:
    """Whether a question is answerable and easy: of a level up to `easy_up_to`, or without a level and answered
    correctly by the base (`right`).
    """
    easy = 1 <= example.difficulty <= easy_up_to if example.difficulty else right
    return example.answerable and easy


def level(example: Example) -> str:
    """The key of a question in tables by difficulty: its level, `NO_ANSWER`, or `NO_LEVEL`."""
    return (str(example.difficulty) if example.difficulty else NO_LEVEL) if example.answerable else NO_ANSWER


def level_title(key: str) -> str:
    """The heading of a `level` in tables and pictures."""
    return {NO_ANSWER: "unanswerable", NO_LEVEL: "no level"}.get(key, f"level {key}")


def to_json(example: Example) -> dict[str, Any]:
    """An example as a JSON object."""
    return {
        "id": example.id,
        "domain": example.domain,
        "difficulty": example.difficulty,
        "messages": [{"role": m.role, "content": m.content} for m in example.messages],
        "answer": example.answer,
        "source": example.source,
        "meta": dict(example.meta),
    }


def to_line(example: Example) -> str:
    """An example as a JSON line, with line break."""
    return json.dumps(to_json(example), ensure_ascii=False) + "\n"


def from_json(row: Mapping[str, Any]) -> Example:
    """Inverse of `to_json`; KeyError or TypeError if a field is missing or has the wrong type."""
    messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
    return Example(row["id"], row["domain"], row["difficulty"], messages, row["answer"], row["source"], row["meta"])


def iterate_examples(path: Path) -> Iterator[Example]:
    """Read a split line by line; `DataError` names file and line of an invalid row."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield from_json(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}:{number} is not an example ({error}): build this step again") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: build the step that produces the examples first") from error


def read_examples(path: Path) -> list[Example]:
    """All examples of a split."""
    return list(iterate_examples(path))


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Write a split atomically, creating parent folders; returns the number of examples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for example in examples:
                file.write(to_line(example))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count
