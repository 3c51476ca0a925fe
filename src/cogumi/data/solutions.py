"""Distinct correct solutions per question on disk, one JSON object per line, and as training examples (SPEC C12)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.files import write_text
from cogumi.core.types import Example

FILE = "paths.jsonl"


@dataclass(frozen=True, slots=True)
class Solutions:
    """An example's `id`, its question's text, and its distinct correct answers, most frequent first."""

    id: str
    question: str
    answers: tuple[str, ...]


def write_solutions(artifact: Path, rows: Iterable[Solutions]) -> None:
    """Write the solutions of an artifact, atomically."""
    lines = ({"id": row.id, "question": row.question, "paths": row.answers} for row in rows)
    write_text(artifact / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_solutions(artifact: Path) -> list[Solutions]:
    """All questions of an artifact with their solutions."""

    def parse(id: str, question: str, paths: list[Any]) -> Solutions:
        return Solutions(id, question, tuple(paths))

    try:
        lines = filter(None, (artifact / FILE).read_text(encoding="utf-8").split("\n"))
        return [parse(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{artifact / FILE} is not a file of solutions ({error}); build the `paths` step again"
        ) from error


def solution_examples(rows: Sequence[Solutions], examples: Iterable[Example]) -> list[Example]:
    """One example per solution: its question with that solution as the answer and the same check; ids are `<id>-<n>`.

    `examples` must include every question of `rows`, else `DataError`.
    """
    known: Mapping[str, Example] = {e.id: e for e in examples}
    for row in rows:
        if row.id not in known:
            raise DataError(f"no example for the solutions of question {row.id}; give the examples they were made from")
    return [
        replace(known[row.id], id=f"{row.id}-{n}", answer=answer, source="paths")
        for row in rows
        for n, answer in enumerate(row.answers, 1)
    ]
