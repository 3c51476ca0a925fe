"""Distinct correct solutions per question on disk, one JSON object per line (SPEC C12)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cogumi.core.files import write_text

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
