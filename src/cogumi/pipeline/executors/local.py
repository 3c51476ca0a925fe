"""Runs steps in parallel in worker processes of this machine, each with its number of threads.

A worker is a new interpreter, not a fork. It starts when it is first needed and runs until the build ends, because
importing the training libraries takes seconds. `worker.py` is the program of the worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection

from cogumi.core.environment import available_memory
from cogumi.core.errors import CogumiError
from cogumi.pipeline.build_progress import Progress
from cogumi.pipeline.executor import Ended, Task

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
"""Environment variables from which libraries read their number of threads when they are loaded."""
LOOK_EVERY = 1.0
"""Seconds between two checks whether the workers are alive."""


class _Worker:
    """A worker process and its pipes; `task` is the step it runs, or None."""

    def __init__(self, threads: int, lock: int) -> None:
        self.task: Task | None = None
        self.threads = threads
        self._partial = b""
        self.connection, theirs = connection.Pipe()
        # The worker imports from the same folders as this process, including those added to sys.path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        command = [sys.executable, "-m", "cogumi.pipeline.executors.worker", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), lock),
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)

    def lines(self) -> Iterator[str]:
        """Complete lines that the worker has printed since the last call."""
        with suppress(BlockingIOError):
            while piece := os.read(self.output, 1 << 16):
                *whole, self._partial = (self._partial + piece).split(b"\n")
                for line in whole:
                    yield line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")  # as a terminal shows it

    def end(self) -> int:
        """Kill the process if it still runs; returns its exit status, negative for a signal."""
        self.process.kill()
        status = self.process.wait()
        self.connection.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


def _death(step: str, status: int) -> CogumiError:
    """The error for a worker that ended during a step."""
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    why = ", as the system does when memory runs out (--jobs 1 needs less)" if status == -signal.SIGKILL else ""
    return CogumiError(
        f"step '{step}': its process {how}{why}; run the same command again to continue: finished steps are kept"
    )


class LocalProcesses:
    """An `Executor` with up to `jobs` steps at a time, each in a worker process with the step's number of threads.

    `lock` is the descriptor of the build's lock. Workers inherit it, so that the folder stays locked until all
    processes that may write to it have ended, even if this one is killed.
    """

    def __init__(self, jobs: int, lock: int) -> None:
        self._jobs, self._lock = jobs, lock
        self._workers: list[_Worker] = []

    def _busy(self) -> dict[_Worker, Task]:
        return {worker: worker.task for worker in self._workers if worker.task is not None}

    def has_room(self, memory: int) -> bool:
        """Whether no step is running, or a worker is free and `memory` bytes are available."""
        busy = self._busy()
        return not busy or (len(busy) < self._jobs and available_memory() >= memory)

    def start(self, task: Task) -> None:
        """Give the step to an idle worker, or to a new one."""
        for worker in self._workers:
            if worker.task is None and worker.threads == task.threads and worker.process.poll() is None:
                break
        else:
            worker = _Worker(task.threads, self._lock)
            self._workers.append(worker)
        worker.task = task
        with suppress(BrokenPipeError):  # the worker just died; `wait` handles that
            worker.connection.send(task)

    def wait(self, progress: Progress) -> Ended:
        """Forward progress and printed lines of the workers until a step ends or its worker dies."""
        while True:
            busy = self._busy()
            pipes = [pipe for worker in busy for pipe in (worker.connection, worker.output)]
            connection.wait(pipes, LOOK_EVERY)
            for worker, task in busy.items():
                dead = worker.process.poll() is not None  # checked before its last messages are read
                ended = self._receive(worker, task, progress)
                for line in worker.lines():
                    progress.printed(task.step, line)
                if ended is None and dead:
                    self._workers.remove(worker)
                    ended = Ended(task.step, _death(task.step, worker.end()))
                if ended is not None:
                    worker.task = None
                    return ended

    def _receive(self, worker: _Worker, task: Task, progress: Progress) -> Ended | None:
        """Read the worker's messages; returns the result of its step if it was among them."""
        with suppress(EOFError, OSError):  # the worker died, perhaps in the middle of a message
            while worker.connection.poll():
                message = worker.connection.recv()
                if isinstance(message, Ended):
                    return message
                progress.advanced(task.step, *message)
        return None

    def close(self) -> None:
        """Kill all workers; the next build continues interrupted steps from their checkpoints."""
        while self._workers:
            self._workers.pop().end()
