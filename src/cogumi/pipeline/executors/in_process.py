"""Runs steps in this process, one after another, with all its threads."""

from __future__ import annotations

from functools import partial

from cogumi.pipeline.build_progress import Progress
from cogumi.pipeline.executor import Ended, Task, run_task


class InProcess:
    """An `Executor` that runs a step within `wait`."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def has_room(self, memory: int) -> bool:
        """Whether no step is running."""
        return self._task is None

    def start(self, task: Task) -> None:
        """Store the step until `wait`."""
        self._task = task

    def wait(self, progress: Progress) -> Ended:
        """Run the step."""
        task, self._task = self._task, None
        assert task is not None, "wait() without start()"
        try:
            run_task(task, partial(progress.advanced, task.step))
        except Exception as error:
            return Ended(task.step, error)
        return Ended(task.step, None)

    def close(self) -> None:
        """Do nothing: no step runs outside `wait`."""
