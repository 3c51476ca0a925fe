"""What is in question files: forms, rows, rejected rows by reason, lengths, repeated questions, graders (SPEC A1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cogumi.core.types import Example
from cogumi.data.examples import normalised_question
from cogumi.data.sources.containers import topic
from cogumi.data.sources.hub import is_hub_id
from cogumi.data.sources.question_files import Reading, Rejected, Seen, iterate
from cogumi.grading.suggest import suggested_grader

SAMPLE = 5_000
"""Answers that a grader is suggested from, and lengths that quantiles are taken of: those of the first rows."""
PER_REPORT = 1_000
_QUOTED = re.compile(r"'[^']*'|\d+")


@dataclass(slots=True)
class Look:
    """The rows of one path. `reasons` counts rejected rows by their reason without its details; `first` is an example
    of each. Lengths are in words.
    """

    path: Path
    rows: int = 0
    repeated: int = 0
    seen: Seen = field(default_factory=Seen)
    domains: Counter[str] = field(default_factory=Counter)
    graders: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, Rejected] = field(default_factory=dict)
    example: Example | None = None
    _questions: set[bytes] = field(default_factory=set)
    _answers: list[str] = field(default_factory=list)
    _words: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How tables call the path: a file by its name, a data set by its id."""
        return str(self.path) if is_hub_id(self.path) else self.path.name

    @property
    def rejected(self) -> int:
        """Number of rejected rows."""
        return self.reasons.total()

    @property
    def grader(self) -> str | None:
        """The checks of the rows, or else the grader that fits their answers; None if no grader fits."""
        if self.graders:
            return ", ".join(name for name, _ in self.graders.most_common(3))
        return suggested_grader(self._answers) if self._answers else None

    def words(self, part: int, share: float) -> int:
        """The length that a share of the questions (part 0) or answers (part 1) does not exceed."""
        lengths = sorted(pair[part] for pair in self._words)
        return lengths[min(int(share * len(lengths)), len(lengths) - 1)] if lengths else 0

    def add(self, row: Example | Rejected) -> None:
        """Count one row."""
        if isinstance(row, Rejected):
            kind = _QUOTED.sub("…", row.reason)[:120]
            self.reasons[kind] += 1
            self.first.setdefault(kind, row)
            return
        self.rows += 1
        self.domains[row.domain] += 1
        self.example = self.example or row
        if "check" in row.meta:
            self.graders[row.check["kind"]] += 1
        question = normalised_question(row.messages)
        digest = blake2b(question.encode(), digest_size=8).digest()
        self.repeated += digest in self._questions
        self._questions.add(digest)
        if len(self._words) < SAMPLE:
            self._words.append((len(question.split()), len(row.answer.split())))
            self._answers.append(row.answer)

    def to_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return {
            "path": str(self.path),
            "forms": dict(self.seen.forms),
            "rows": self.rows,
            "rejected": self.rejected,
            "reasons": [
                {"reason": kind, "rows": count, "first": str(self.first[kind])}
                for kind, count in self.reasons.most_common()
            ],
            "repeated_questions": self.repeated,
            "unused_columns": dict(self.seen.unused),
            "domains": dict(self.domains),
            "question_words": {str(q): self.words(0, q) for q in (0.5, 0.95)},
            "answer_words": {str(q): self.words(1, q) for q in (0.5, 0.95)},
            "grader": self.grader,
            "own_checks": dict(self.graders),
        }


def look(path: Path, reading: Reading | None = None, progress: Callable[[int], None] = lambda rows: None) -> Look:
    """Read a path once, in memory that grows by a few bytes per row. Raises `DataError` if it cannot be read."""
    found = Look(path)
    for number, row in enumerate(iterate(path, topic(path) or "general", found.seen, reading), 1):
        found.add(row)
        if number % PER_REPORT == 0:
            progress(number)
    return found
