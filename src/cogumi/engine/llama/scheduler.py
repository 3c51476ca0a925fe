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
from cogumi.engine.llama.context_pool import ContextPool
from cogumi.engine.llama.jobs import Prefill

T = TypeVar("T")


class Scheduler:
    """Runs jobs in the contexts of a pool, round robin; at most `slots` jobs at a time and `queue` more waiting.

    A cancelled job leaves its slot, or the queue, before the next batch. When the thread ends, every job ends: with the
    error that ended the thread, or as cancelled after `stop`.
    """

    def __init__(self, pool: ContextPool, *, slots: int, queue: int) -> None:
        self._pool = pool
        self._slots, self._queue = slots, queue
        self._waiting: deque[tuple[str | None, Job]] = deque()
        self._prefills: deque[tuple[str | None, Job]] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cancelled = self._closing = False
        self._ended: Exception | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cogumi-scheduler", daemon=True)
        self._thread.start()

    @property
    def free_slots(self) -> int:
        """Number of slots without a job."""
        return self._slots - self._active()

    def submit(self, adapter: str | None, job: Job) -> None:
        """Queue a job; `BusyError` if the queue is full."""
        with self._wake:
            if self._ended:
                raise self._ended
            self._drop_cancelled()
            if (waiting := len(self._waiting) + len(self._prefills)) >= self._queue:
                raise BusyError(f"{waiting} requests are waiting already; try again in a moment")
            (self._prefills if isinstance(job, Prefill) else self._waiting).append((adapter, job))
            self._wake.notify()

    def cancel(self, job: Generation | Prefill) -> None:
        """Request the end of a job as cancelled. Takes no lock, because garbage collection may call it anywhere."""
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
        """Request that all jobs end as cancelled and the contexts are freed; returns immediately."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """End all jobs as cancelled and free the contexts."""
        self.stop()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        """End the cancelled jobs in the queues; the caller must hold the lock."""
        if not self._cancelled:
            return
        self._cancelled = False
        dropped: list[Job] = []
        for queue in (self._waiting, self._prefills):
            waiting = list(queue)
            queue.clear()
            for adapter, job in waiting:
                if job.cancelled:
                    dropped.append(job)
                else:
                    queue.append((adapter, job))
        for job in dropped:
            job.end("cancelled")

    # The methods below run on the scheduler's thread.

    def _run(self) -> None:
        try:
            while self._admit():
                for context in self._pool.all():
                    context.step()
        finally:
            self._end(sys.exception())

    def _active(self) -> int:
        return sum(len(context) for context in self._pool.all())

    def _admit(self) -> bool:
        """Wait for work, run calls, fill free slots; False when closing."""
        with self._wake:
            while not (self._active() or self._waiting or self._prefills or self._calls or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            self._drop_cancelled()
        while self._calls:
            function, result = self._calls[0]
            try:
                result.set_result(function())
            except Exception as error:  # raised in the caller
                result.set_exception(error)
            self._calls.popleft()
        for context in self._pool.all():
            context.remove_cancelled()
        while waiting := self._next():
            adapter, job = waiting
            try:
                self._pool.get(adapter).admit(job)  # a job cancelled in the meantime leaves before the next batch
            except Exception as error:  # raised in the reader of the job
                job.fail(error)
        return True

    def _next(self) -> tuple[str | None, Job] | None:
        """The next job to admit, if a slot is free. Prefills leave one slot free for requests."""
        free = self._slots - self._active()
        with self._wake:
            if self._waiting and free:
                return self._waiting.popleft()
            return self._prefills.popleft() if self._prefills and free > min(1, self._slots - 1) else None

    def _end(self, error: BaseException | None) -> None:
        """End all jobs: generations as cancelled, or all jobs with the error that ended the thread."""
        with self._wake:
            self._ended = RequestError(
                f"the engine has stopped ({error}); open it again" if error else "the engine is closed"
            )
            jobs = [job for context in self._pool.all() for job in context.jobs]
            jobs += [job for _, job in (*self._waiting, *self._prefills)]
            self._waiting.clear()
            self._prefills.clear()
            calls, self._calls = self._calls, deque()
        for job in jobs:
            if isinstance(job, Generation) and error is None:
                job.end("cancelled")
            else:
                job.fail(self._ended)
        for _, result in calls:
            result.set_exception(self._ended)
        self._pool.close()
