"""The protocol of executors: they run steps, locally or elsewhere, one or several at a time.

The build decides which steps may run and with how many threads; an executor chooses the process. The number of threads
never depends on timing, so that an interrupted and an uninterrupted build produce the same bytes.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from cogumi.core import artifact
from cogumi.core.environment import end_idle_threads, environment, peak_rss_bytes
from cogumi.core.errors import RecipeError
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.pipeline.build_progress import Progress
from cogumi.pipeline.failures import named


class Inputs(dict[str, Artifact]):
    """Role -> artifact; raises `RecipeError` for a role that the recipe does not give."""

    def __missing__(self, role: str) -> Artifact:
        raise RecipeError(f"the stage needs an input '{role}'; given: {', '.join(self) or 'none'}")


@dataclass(frozen=True, slots=True)
class Task:
    """All data needed to run one step; it can be pickled and sent to another process.

    `threads` is the number it computes with, `module` the stage's module name, `inputs` the folders of finished steps
    by role, `folder` the prepared output.
    """

    step: str
    threads: int
    module: str
    config: BaseModel
    seed: int
    root: Path
    inputs: Mapping[str, Path]
    folder: Path
    fingerprint: str
    logs: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of a task: `error` is None if the step's folder has its manifest."""

    step: str
    error: BaseException | None


class Executor(Protocol):
    """Runs steps. The build asks `has_room`, then starts a step, and waits when nothing more can start."""

    def has_room(self, memory: int) -> bool:
        """Whether a further step that may need `memory` bytes can start now; true if no step is running."""

    def start(self, task: Task) -> None:
        """Start a step."""

    def wait(self, progress: Progress) -> Ended:
        """Wait until a running step ends; until then, report the progress of all running steps."""

    def close(self) -> None:
        """Stop all running steps at once."""


def run_task(task: Task, progress: Callable[[int, int | None, Mapping[str, float]], None]) -> None:
    """Run one step in this process and write its manifest; errors name the step."""
    with named(f"step '{task.step}'", task.folder):
        stage = importlib.import_module(task.module)
        inputs = Inputs({role: artifact.load(folder) for role, folder in task.inputs.items()})
        if torch := sys.modules.get("torch"):  # a stage that ran before in this process may have changed it
            torch.set_num_threads(task.threads)
        started = time.perf_counter()
        try:
            metrics = stage.run(
                task.config, inputs, task.folder, Context(task.seed, task.threads, task.root, progress, task.logs)
            )
        finally:
            end_idle_threads()
        artifact.finish(
            task.folder,
            kind=stage.KIND,
            fingerprint=task.fingerprint,
            parents={role: parent.fingerprint for role, parent in inputs.items()},
            metrics=metrics,
            environment={**environment(task.threads), "peak_rss_bytes": peak_rss_bytes()},
            seconds=time.perf_counter() - started,
        )
