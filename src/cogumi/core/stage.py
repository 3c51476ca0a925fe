"""The contract of a stage: a self-describing module that turns artifacts into an artifact (ARCHITECTURE, "Stages")."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from cogumi.core.types import Artifact

CHECKPOINT = "checkpoint"
"""The folder in a stage's `out` that is kept when a run is killed; the pipeline removes it after the step."""
DECLARED = ("VERSION", "KIND", "INPUTS", "Config", "run")
"""Names that every stage module must define."""


@dataclass(frozen=True, slots=True)
class Context:
    """Arguments of every run of a stage.

    Relative paths of a recipe start at `root`. `progress(done, total, figures)` reports progress; `total` is None if
    it is unknown. `logs` is a folder for TensorBoard, or None.
    """

    seed: int
    threads: int
    root: Path
    progress: Callable[[int, int | None, Mapping[str, float]], None]
    logs: Path | None = None


class Stage(Protocol):
    """A module with these five names. Other modules know about the stage only what it declares.

    `KIND` is the kind of artifact it makes; `INPUTS` are the required inputs, role -> kind. A role that ends in `*`
    matches one or more roles with that prefix (`draft_*`); alternative kinds are joined by `|` (`adapter|backbone`).
    The pipeline checks inputs before anything runs.

    `run` writes its files into `out`, which is empty except for `out / CHECKPOINT` of an interrupted run, and
    returns its metrics. Equal config, seed, inputs and threads must give equal bytes, interrupted or not. `VERSION`
    must be raised when the same config would give other bytes. A `pathlib.Path` in the config is an input file or
    folder, relative to `context.root`; its content is part of the fingerprint.

    A module may also have:

    - `OPTIONAL: Mapping[str, str]`: optional inputs, as in `INPUTS`; any other input is refused.
    - `needs(config, roles) -> Mapping[str, str]`: further inputs that this config requires;
      `roles` are those in the recipe.
    - `estimate(config, given) -> Estimate`: outputs and costs of a step before it runs (see `core.estimate`).
    - `identity(config, root) -> Any`: the JSON value that stands for the config in the step's fingerprint, for stages
      that identify a file by its content alone. It may refuse the file, before anything runs.
    - `TRAINS = True`: `run` trains by `train.loop`, so several processes may run it together (see `pipeline.ranks`).
    - `LIGHT = True`: `run` takes seconds, so that a step beside it keeps all threads (see `pipeline.build`).
    - `REPORTS = True`: its metrics, `report.md` and pictures become those of the whole build.
    """

    VERSION: int
    KIND: str
    INPUTS: Mapping[str, str]
    Config: type[BaseModel]

    def run(self, config: Any, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
        """Do the work and return the metrics."""


def needed_inputs(stage: Stage, config: Any, roles: Collection[str]) -> dict[str, str]:
    """The required inputs of a step, role -> kind; `roles` are those in the recipe."""
    hook = getattr(stage, "needs", None)
    return {**stage.INPUTS, **(hook(config, roles) if hook else {})}


def optional_inputs(stage: Stage) -> Mapping[str, str]:
    """The optional inputs of a step, role -> kind."""
    found: Mapping[str, str] = getattr(stage, "OPTIONAL", {})
    return found


def matches(role: str, declared: str) -> bool:
    """Whether a role of a recipe matches a declared one: `modifier_code` matches `modifier_*`."""
    if not declared.endswith("*"):
        return role == declared
    return role.startswith(declared[:-1]) and role != declared[:-1]
