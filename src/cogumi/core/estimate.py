"""The `estimate` of a stage: what a step makes and takes, said before it runs (SPEC D1).

`estimate(config, given) -> Estimate` is a pure function of the stage's module. It may read what the config names (a
file's size, a model's config.json), but loads no weights and downloads nothing. How long a step takes is not guessed.
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
    """What there is to train on: `gpus` alike, each with `memory` bytes (None: unknown, nothing is checked)."""

    memory: int | None = None
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step takes. Sizes are bytes; a figure that has no meaning for the step, or is unknown, is None.

    `shape` is that of the model it works on, `parameters` its weights, `trained` those that change. `tokens` are read
    in training, `flops` the arithmetic on them; `memory` is that of each device; `output` and `checkpoint` (with its
    replacement beside it) lie on disk.
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
    """What a stage says of a step before it runs.

    `facts` are what later steps may know of its artifact: at most one record of a type; None where it is unknown.
    `notes` are worth a line to the user. `problems` would stop or spoil the build, a line each.
    """

    facts: tuple[object | None, ...] = ()
    cost: Cost = Cost()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Input:
    """An input before it is there: the step that makes it, and what is known of its artifact."""

    step: str
    facts: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What an `estimate` may look at beside its config: the step's name, where relative paths start, inputs by role.

    `length` replaces the estimated tokens of the longest row. A role may be absent that the stage needs: the pipeline
    has said so already, and the estimate says what it can without it.
    """

    step: str
    root: Path
    inputs: Mapping[str, Input] = field(default_factory=dict)
    hardware: Hardware = Hardware()
    length: int | None = None

    def find(self, role: str, of: type[T]) -> T | None:
        """What is known of an input, of one type of record; None if nothing is."""
        facts = self.inputs[role].facts if role in self.inputs else ()
        return next((fact for fact in facts if isinstance(fact, of)), None)

    def rows(self, role: str, model: ModelFacts) -> Rows | None:
        """Lengths of the training rows of an input in tokens of a model; None if they are unknown."""
        rows = self.find(role, RowFacts)
        return rows.rows(model.template, self.length) if rows else None


def estimate(stage: Stage, config: Any, given: Given) -> Estimate:
    """What the stage says of a step; an empty estimate if its module has no `estimate`."""
    hook = getattr(stage, "estimate", None)
    return hook(config, given) if hook else Estimate()


def uncounted(*facts: object | None, model: ModelFacts | None = None, steps: int | None = None) -> Estimate:
    """The estimate of a step that computes for long, of which nothing is counted but the `steps` it trains, if any."""
    if steps is None or model is None:
        return Estimate(facts, notes=(NOT_COUNTED,))
    return Estimate(facts, Cost(shape=model.shape, steps=steps), notes=(MEMORY_NOT_COUNTED,))
