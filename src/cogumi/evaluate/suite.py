"""Suites: named sets of measurements for `cogumi eval --suite`, each a module with `run(task) -> Findings`.

A suite measures everything that it reports. To add a suite, add a file and a row of `SUITES`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from cogumi.core.errors import CogumiError
from cogumi.core.packages import load
from cogumi.core.registry import nearest

SUITES: dict[str, str] = {
    "honesty": "cogumi.evaluate.suites.honesty",
    "routing": "cogumi.evaluate.suites.routing",
    "domains": "cogumi.evaluate.suites.domains",
    "escalation": "cogumi.evaluate.suites.escalation",
    "cache": "cogumi.evaluate.suites.cache",
    "deliberation": "cogumi.evaluate.suites.deliberation",
    "learning": "cogumi.evaluate.suites.learning",
    "training": "cogumi.evaluate.suites.training",
    "templates": "cogumi.evaluate.suites.templates",
    "compression": "cogumi.evaluate.suites.compression",
    "cloze": "cogumi.evaluate.suites.cloze",
    "automation": "cogumi.evaluate.suites.automation_tasks",
}
"""Name -> module."""

_RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True, slots=True)
class Task:
    """Inputs of a suite: a bundle's folder, the user's data, and a folder for pictures (each None if not given).

    `limit` and `threads` are those of suites with models and rows of the user's choice (None: all rows; the engine's
    default). `progress(done, total, figures)` may be called at any rate.
    """

    bundle: Path | None = None
    data: Path | None = None
    out: Path | None = None
    seed: int = 0
    limit: int | None = None
    threads: int | None = None
    progress: Callable[[int, int, Mapping[str, float]], None] = lambda done, total, figures: None


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of a suite's table. `goal` has the form ">= 0.85"; `low` and `high` are 95% bounds, if measured."""

    name: str
    value: float | None
    goal: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a value."""
        if not self.goal or self.value is None:
            return None
        relation, bound = self.goal.split()
        return bool(_RELATIONS[relation](self.value, float(bound)))


@dataclass(frozen=True, slots=True)
class Findings:
    """A suite's table, `facts` about the measurement (rows, seconds, assumptions), and its pictures."""

    figures: Sequence[Figure]
    facts: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Path] = ()


class Suite(Protocol):
    """A suite's module."""

    def run(self, task: Task) -> Findings:
        """Measure. Raises `CogumiError` if `task` lacks an input that the suite needs."""


def suite(name: str) -> Suite:
    """The suite of that name; `CogumiError` with the nearest name if there is none."""
    if name not in SUITES:
        raise CogumiError(f"unknown suite '{name}'; {nearest(name, SUITES)}")
    return cast(Suite, load(SUITES[name], f"suite '{name}'"))
