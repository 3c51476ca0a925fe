"""The `estimate` of a stage: outputs and costs of a step before it runs (SPEC D1).

`estimate(config, given) -> Estimate` is a pure function in the stage's module. It may read files that the config names
(a file's size, a model's config.json), but loads no weights and downloads nothing. Durations are not estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cogumi.core.facts import ModelFacts, RowFacts, Rows
from cogumi.core.footprint import Footprint
from cogumi.core.shapes import ModelShape
from cogumi.core.stage import Stage

NOT_COUNTED = "not planned: its time and memory"
MEMORY_NOT_COUNTED = "not planned: its memory"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hardware:
    """Training hardware: `gpus` identical devices, each with `memory` bytes (None: unknown, not checked)."""

    memory: int | None = None
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a step. Sizes are bytes; a figure that does not apply or is unknown is None.

    `shape` is that of the model, `parameters` its number of weights, `trained` the number of trained weights. `tokens`
    are processed in training with `flops` operations; `memory` is per device; `output` and `checkpoint` (including its
    temporary replacement) are sizes on disk.
    """

    method: str = ""
    shape: ModelShape | None = None
    parameters: int | None = None
    trained: int | None = None
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    memory: Footprint | None = None
    output: int | None = None
    checkpoint: int | None = None
    needs_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimate of a step before it runs.

    `facts` describe its artifact for later steps: at most one record per type; None if unknown. `notes` are lines for
    the user. `problems` are lines about errors that would stop or spoil the build.
    """

    facts: tuple[object | None, ...] = ()
    cost: Cost = Cost()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Input:
    """A planned input: the step that makes it, and the known facts about its artifact."""

    step: str
    facts: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """Arguments of an `estimate` besides the config: the step's name, the root of relative paths, inputs by role.

    `length` replaces the estimated tokens of the longest row. A required role may be missing: the pipeline reports that
    separately, and the estimate covers the rest.
    """

    step: str
    root: Path
    inputs: Mapping[str, Input] = field(default_factory=dict)
    hardware: Hardware = Hardware()
    length: int | None = None

    def find(self, role: str, of: type[T]) -> T | None:
        """The facts of one type about an input; None if unknown."""
        facts = self.inputs[role].facts if role in self.inputs else ()
        return next((fact for fact in facts if isinstance(fact, of)), None)

    def rows(self, role: str, model: ModelFacts) -> Rows | None:
        """Lengths of the training rows of an input in tokens of a model; None if they are unknown."""
        rows = self.find(role, RowFacts)
        return rows.rows(model.template, self.length) if rows else None


def estimate(stage: Stage, config: Any, given: Given) -> Estimate:
    """The stage's estimate of a step; empty if its module has no `estimate`."""
    hook = getattr(stage, "estimate", None)
    return hook(config, given) if hook else Estimate()


def uncounted(*facts: object | None, model: ModelFacts | None = None, steps: int | None = None) -> Estimate:
    """The estimate of a long-running step whose cost is not estimated, except the number of training `steps`."""
    if steps is None or model is None:
        return Estimate(facts, notes=(NOT_COUNTED,))
    return Estimate(facts, Cost(shape=model.shape, steps=steps), notes=(MEMORY_NOT_COUNTED,))
