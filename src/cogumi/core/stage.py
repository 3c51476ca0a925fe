"""What a stage is: a module that turns artifacts into an artifact, and describes itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from cogumi.core.types import Artifact

CHECKPOINT = "checkpoint"
"""The folder in a stage's `out` that outlives a killed run; the pipeline removes it when the step is done."""
DECLARED = ("VERSION", "KIND", "INPUTS", "Config", "run")
"""The names that every stage module has."""


@dataclass(frozen=True, slots=True)
class Context:
    """What every run of a stage is given.

    `root` is where relative paths of a recipe start. `progress(done, total, figures)` shows how far the work
    is; `total` is None where nobody can know. `logs` is a folder for TensorBoard, or None.
    """

    seed: int
    threads: int
    root: Path
    progress: Callable[[int, int | None, Mapping[str, float]], None]
    logs: Path | None = None


class Stage(Protocol):
    """A module with these five names. Nothing outside of it knows more about the stage than it says here.

    `KIND` is the kind of artifact it makes; `INPUTS` are the inputs it cannot do without, role -> kind. A role that
    ends in `*` stands for one or more roles that begin so (`draft_*`); kinds between which the recipe may choose are
    joined by `|` (`adapter|backbone`). The pipeline checks inputs before anything runs.

    `run` writes its files into `out`, which is empty but for `out / CHECKPOINT` of an interrupted run, and
    returns its metrics. Equal config, seed, inputs and threads must give equal bytes, interrupted or not.
    `VERSION` grows whenever the same config would give other bytes. A `pathlib.Path` in the config names an
    input file or folder, relative to `context.root`: its content counts in the fingerprint.

    A module may also have:

    - `OPTIONAL: Mapping[str, str]`: inputs that a recipe may give, as in `INPUTS`; any other is refused.
    - `needs(config, roles) -> Mapping[str, str]`: inputs that this config needs beside `INPUTS`, as in `INPUTS`;
      `roles` are those that the recipe gives.
    - `estimate(config, given) -> Estimate`: what a step makes and takes, before it runs (see `core.estimate`).
    - `TRAINS = True`: `run` trains by `train.loop`, so several processes may run it together (see `pipeline.ranks`).
    - `REPORTS = True`: its metrics, `report.md` and pictures are those of the whole build.
    """

    VERSION: int
    KIND: str
    INPUTS: Mapping[str, str]
    Config: type[BaseModel]

    def run(self, config: Any, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
        """Do the work and return the metrics."""


def needed_inputs(stage: Stage, config: Any, roles: Collection[str]) -> dict[str, str]:
    """The inputs that a step cannot do without, role -> kind; `roles` are those that the recipe gives."""
    hook = getattr(stage, "needs", None)
    return {**stage.INPUTS, **(hook(config, roles) if hook else {})}


def optional_inputs(stage: Stage) -> Mapping[str, str]:
    """The inputs that a step may be given, role -> kind."""
    found: Mapping[str, str] = getattr(stage, "OPTIONAL", {})
    return found


def matches(role: str, declared: str) -> bool:
    """Whether a role of a recipe is one that a stage declares: `modifier_code` is `modifier_*`."""
    if not declared.endswith("*"):
        return role == declared
    return role.startswith(declared[:-1]) and role != declared[:-1]
