"""A second opinion on verdicts: graded answers are graded again by another method (SPEC B3).

The answers are those of `cogumi eval --out`. A difference is not yet an error: two methods measure different things.
What counts is what a person sees who reads both texts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogumi.confidence.metrics import wilson
from cogumi.core.errors import DataError
from cogumi.core.registry import nearest
from cogumi.core.types import Example, Message
from cogumi.grading.graders import grade_all, problem_of
from cogumi.grading.model_graders import NO_MODELS, Models

METHODS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"kind": "exact"},
    "short_answer": {"kind": "short_answer"},
    "numeric": {"kind": "numeric"},
    "choice": {"kind": "choice"},
    "f1": {"kind": "f1", "at_least": 0.5},
    "rouge_l": {"kind": "rouge_l", "at_least": 0.5},
    "tool_call": {"kind": "tool_call", "ordered": False},
    "similarity": {"kind": "similarity", "at_least": 0.8},
    "judge": {"kind": "judge"},
}
"""Checks that need nothing but the expected answer, and the last two a model."""
_NEEDED = ("question", "answer", "output", "correct", "grader")


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer on which the methods differ: the row of the file, and the reason if the second verdict is wrong."""

    line: int
    row: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Opinion:
    """How often two methods agree on a sample. `skipped` answers cannot be graded by the second one."""

    method: str
    compared: int
    skipped: int
    differences: Sequence[Difference]

    def to_json(self) -> dict[str, Any]:
        """All figures as one JSON object; `interval` bounds the share of differences (95%, Wilson)."""
        n, different = self.compared, len(self.differences)
        return {
            "method": self.method,
            "compared": n,
            "skipped": self.skipped,
            "differences": different,
            "share": different / n if n else None,
            "interval": wilson(different, n) if n else None,
            "only_first_right": sum(bool(d.row["correct"]) for d in self.differences),
            "only_second_right": sum(not d.row["correct"] for d in self.differences),
            "rows": [{"line": d.line, **d.row, "second_reason": d.reason} for d in self.differences],
        }


def audit(path: Path, method: str, sample: int, seed: int = 0, models: Models = NO_MODELS) -> Opinion:
    """Grade a random sample of the answers of a file again.

    The methods `similarity` and `judge` ask `models`. Raises `DataError` for an unknown method, a file without graded
    answers, and if no answer can be graded by the method.
    """
    if method not in METHODS:
        raise DataError(f"'{method}' is not a method of a second opinion: {nearest(method, list(METHODS))}")
    rows = _rows(path)
    picked = sorted(random.Random(seed).sample(range(len(rows)), min(sample, len(rows))))
    examples = {at: _example(rows[at], METHODS[method]) for at in picked}
    usable = [at for at in picked if problem_of(examples[at]) is None]
    if not usable:
        raise DataError(f"none of {len(picked)} answers can be graded by '{method}': {problem_of(examples[picked[0]])}")
    verdicts = grade_all([(examples[at], rows[at]["output"]) for at in usable], models)
    differences = [
        Difference(at + 1, rows[at], verdict.reason)
        for at, verdict in zip(usable, verdicts, strict=True)
        if verdict.correct != rows[at]["correct"]
    ]
    return Opinion(method, len(usable), len(picked) - len(usable), differences)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path") from error
    if not rows or not all(isinstance(row, dict) and all(name in row for name in _NEEDED) for row in rows):
        raise DataError(f"{path} holds no graded answers: write them with `cogumi eval MODEL --data FILE --out {path}`")
    return rows


def _example(row: Mapping[str, Any], check: Mapping[str, Any]) -> Example:
    own = {**check, "answers": [row["answer"]]} if check["kind"] == "short_answer" else dict(check)
    messages = (Message("user", str(row["question"])),)
    return Example("audit", "audit", 0, messages, str(row["answer"]), meta={"check": own})
