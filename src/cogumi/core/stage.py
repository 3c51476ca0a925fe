"""What a stage is: one module that turns artifacts into an artifact (DESIGN, "Stage contract")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from cogumi.core.types import Artifact

CHECKPOINT = "checkpoint"
"""The folder in a stage's `out` that outlives a killed run; the pipeline removes it when the step is done."""


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
    """A module with these four names.

    `run` writes its files into `out`, which is empty but for `out / CHECKPOINT` of an interrupted run, and
    returns its metrics. Equal config, seed, inputs and threads must give equal bytes, interrupted or not.
    `VERSION` grows whenever the same config would give other bytes. A `pathlib.Path` in the config names an
    input file or folder, relative to `context.root`: its content counts in the fingerprint. A stage whose `run` trains
    by `train.loop` may also say `TRAINS = True`: then several processes run it together (see `ranks`).
    """

    VERSION: int
    KIND: str
    Config: type[BaseModel]

    def run(self, config: Any, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
        """Do the work and return the metrics."""
