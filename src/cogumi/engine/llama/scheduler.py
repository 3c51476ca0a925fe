"""Continuous batching: one thread owns all contexts, and requests join and leave between batches (SPEC E1)."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cogumi.core.errors import BusyError, RequestError
from cogumi.engine.generation import Generation
from cogumi.engine.llama.adapter_context import Job
from cogumi.engine.llama.context_pool import Lanes
from cogumi.engine.llama.jobs import Prefill

T = TypeVar("T")


class Scheduler:
    """Runs jobs in lanes that take turns, at most `slots` jobs at a time and `queue` more waiting.

    A cancelled job leaves its slot, or the queue, before the next batch. Whatever ends the thread ends every job:
    with its error, or as cancelled after `stop`.
    """

    def __init__(self, lanes: Lanes, *, slots: int, queue: int) -> None:
        self._lanes = lanes
        self._slots, self._queue = slots, queue
        self._waiting: deque[tuple[str | None, Job]] = deque()
        self._ahead: deque[tuple[str | None, Job]] = deque()  # what is only read ahead
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cancelled = self._closing = False
        self._ended: Exception | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cogumi-scheduler", daemon=True)
        self._thread.start()

    @property
    def free_slots(self) -> int:
        """Slots that no job holds now."""
        return self._slots - self._active()

    def submit(self, adapter: str | None, job: Job) -> None:
        """Queue a job; `BusyError` if too many wait already."""
        with self._wake:
            if self._ended:
                raise self._ended
            self._forget_cancelled()
            if (waiting := len(self._waiting) + len(self._ahead)) >= self._queue:
                raise BusyError(f"{waiting} requests are waiting already; try again in a moment")
            (self._ahead if isinstance(job, Prefill) else self._waiting).append((adapter, job))
            self._wake.notify()

    def cancel(self, job: Generation | Prefill) -> None:
        """Have a job ended as cancelled. Takes no lock: garbage collection may call it at any place."""
        job.cancelled = self._cancelled = True

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the scheduler's thread, between two batches, and return its value."""
        result: Future[T] = Future()
        with self._wake:
            if self._ended:
                raise self._ended
            self._calls.append((function, result))
            self._wake.notify()
        return result.result()

    def stop(self) -> None:
        """Have every job ended as cancelled and the contexts freed, without waiting for it."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """End every job as cancelled and free the contexts."""
        self.stop()
        self._thread.join()

    def _forget_cancelled(self) -> None:
        """End the cancelled jobs in the queue; whoever calls this holds the lock."""
        if not self._cancelled:
            return
        self._cancelled = False
        gone: list[Job] = []
        for queue in (self._waiting, self._ahead):
            waiting = list(queue)
            queue.clear()
            for adapter, job in waiting:
                if job.cancelled:
                    gone.append(job)
                else:
                    queue.append((adapter, job))
        for job in gone:
            job.end("cancelled")

    # What follows runs on the scheduler's thread.

    def _run(self) -> None:
        try:
            while self._admit():
                for lane in self._lanes.all():
                    lane.turn()
        finally:
            self._end(sys.exception())

    def _active(self) -> int:
        return sum(len(lane) for lane in self._lanes.all())

    def _admit(self) -> bool:
        """Sleep while there is nothing to do, run calls, fill free slots; False when closing."""
        with self._wake:
            while not (self._active() or self._waiting or self._ahead or self._calls or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            self._forget_cancelled()
        while self._calls:
            function, result = self._calls[0]
            try:
                result.set_result(function())
            except Exception as error:  # handed to the caller
                result.set_exception(error)
            self._calls.popleft()
        for lane in self._lanes.all():
            lane.sweep()
        while waiting := self._next():
            adapter, job = waiting
            try:
                self._lanes.get(adapter).join(job)  # one that is cancelled by now leaves before the next batch
            except Exception as error:  # handed to whoever waits for the job
                job.fail(error)
        return True

    def _next(self) -> tuple[str | None, Job] | None:
        """The next job to admit, if there is a place. Who only reads ahead leaves one to those who ask."""
        free = self._slots - self._active()
        with self._wake:
            if self._waiting and free:
                return self._waiting.popleft()
            return self._ahead.popleft() if self._ahead and free > min(1, self._slots - 1) else None

    def _end(self, error: BaseException | None) -> None:
        """Leave nobody waiting: answers end as cancelled, or with the error that ended the thread."""
        with self._wake:
            self._ended = RequestError(
                f"the engine has stopped ({error}); open it again" if error else "the engine is closed"
            )
            jobs = [job for lane in self._lanes.all() for job in lane.jobs]
            jobs += [job for _, job in (*self._waiting, *self._ahead)]
            self._waiting.clear()
            self._ahead.clear()
            calls, self._calls = self._calls, deque()
        for job in jobs:
            if isinstance(job, Generation) and error is None:
                job.end("cancelled")
            else:
                job.fail(self._ended)
        for _, result in calls:
            result.set_exception(self._ended)
        self._lanes.close()
