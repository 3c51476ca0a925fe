"""Program of a worker process of `local.py`: runs the steps that the build sends, one after another."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from cogumi.core.errors import CogumiError
from cogumi.pipeline.executor import Ended, Task, run_task

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY = 0.5  # seconds


def _end_with_parent() -> None:
    """End this process when the parent ends or is killed: at once on Linux, within half a second elsewhere."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _portable(error: Exception) -> Exception:
    """The error as one that any process can read, with its traceback as a note."""
    where = "".join(traceback.format_exception(error))
    try:
        known = isinstance(error, CogumiError) or type(error).__module__ == "builtins"
        portable = type(error)(str(error)) if known else RuntimeError(f"{type(error).__name__}: {error}")
    except TypeError:  # its constructor takes more than a message
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note(f"In the step's process:\n{where}")
    return portable


def _run(task: Task, connection: Connection[Any, Any]) -> Ended:
    try:
        run_task(task, lambda done, total, figures: connection.send((done, total, dict(figures))))
    except Exception as error:
        return Ended(task.step, _portable(error))
    return Ended(task.step, None)


def main(descriptor: int) -> None:
    """Run the tasks that arrive on the connection until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the build stops its workers
    _end_with_parent()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # printed lines appear without delay
    connection: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_run(task, connection))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
