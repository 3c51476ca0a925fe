"""Several solutions of one question on disk, one JSON object per question (SPEC C12), and as examples to train on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cogumi.core.errors import ArtifactError, DataError
from cogumi.core.files import write_text
from cogumi.core.types import Example

FILE = "paths.jsonl"


@dataclass(frozen=True, slots=True)
class Paths:
    """An example's `id`, its question's text, and correct answers that differ from each other, most frequent first."""

    id: str
    question: str
    paths: tuple[str, ...]


def write_paths(artifact: Path, rows: Iterable[Paths]) -> None:
    """Write the paths of an artifact, atomically."""
    write_text(artifact / FILE, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def read_paths(artifact: Path) -> list[Paths]:
    """All questions of an artifact with their paths."""
    try:
        lines = list(filter(None, (artifact / FILE).read_text(encoding="utf-8").split("\n")))
        rows = [Paths(**row) for row in map(json.loads, lines)]
        return [replace(row, paths=tuple(row.paths)) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{artifact / FILE} holds no paths ({error}); build the `paths` step again") from error


def path_examples(rows: Sequence[Paths], examples: Iterable[Example]) -> list[Example]:
    """One example per path: its question with that path as the answer, checked as before; ids are `<id>-<n>`.

    `examples` are those that were asked. Raises `DataError` if one of the questions is not among them.
    """
    known: Mapping[str, Example] = {e.id: e for e in examples}
    for row in rows:
        if row.id not in known:
            raise DataError(f"paths of question {row.id}, which is not among the examples; give those that were asked")
    return [
        replace(known[row.id], id=f"{row.id}-{n}", answer=path, source="paths")
        for row in rows
        for n, path in enumerate(row.paths, 1)
    ]
