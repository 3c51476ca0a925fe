"""Accuracy, coverage and accepted error of an engine's answers to a list of questions, for `cogumi eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogumi.cascade.disclaimers import without_disclaimer
from cogumi.core.types import Example, Request
from cogumi.data.examples import level
from cogumi.engine.protocol import Engine, replies
from cogumi.grading.graders import grade_all


def measure(engine: Engine, requests: Sequence[Request], examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy `{domain: {difficulty: [correct, n]}}`, coverage, and the error among accepted answers.

    The last two are None from an engine that does not judge its own answers; the error also if none was accepted.
    """
    answers = list(replies(engine, requests))
    verdicts = grade_all(
        [(example, without_disclaimer(answer.text)) for example, answer in zip(examples, answers, strict=True)]
    )
    cells: dict[str, dict[str, list[int]]] = {}
    kept: list[bool] = []
    for example, answer, verdict in zip(examples, answers, verdicts, strict=True):
        cell = cells.setdefault(example.domain, {}).setdefault(level(example), [0, 0])
        cell[0] += verdict.correct
        cell[1] += 1
        if answer.accepted:
            kept.append(verdict.correct)
    judged = any(answer.decisions for answer in answers)
    return {
        "n": len(examples),
        "correct": sum(verdict.correct for verdict in verdicts),
        "accuracy": cells,
        "coverage": len(kept) / len(examples) if judged else None,
        "accepted_error": 1 - sum(kept) / len(kept) if kept else None,
    }
