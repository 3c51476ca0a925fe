"""Continuous batching: one thread owns all contexts, and requests join and leave between batches (SPEC E1)."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from cogumi.errors import BusyError, CogumiError, RequestError
from cogumi.runtime.generation import Generation
from cogumi.runtime.lane import Lane, Measurement
from cogumi.runtime.llama import Context, Model, Row
from cogumi.runtime.speculate import Acceptance, Costs

T = TypeVar("T")
Job = Generation | Measurement

BATCH = 512
"""Tokens per batch; a longer prompt is read in chunks."""


class Scheduler:
    """Runs jobs on one model (and its draft), at most `slots` at a time and `queue` more waiting.

    `adapters` maps names to loaded adapters; each gets a lane of its own when it is first asked for, and lanes
    take turns. Whatever ends the thread ends every job: with its error, or as cancelled after `close`.
    """

    def __init__(
        self,
        model: Model,
        draft: Model | None,
        adapters: Mapping[str, Any],
        *,
        slots: int,
        length: int,
        threads: int,
        draft_tokens: int,
        queue: int,
    ) -> None:
        self.acceptance = Acceptance()
        self._model, self._draft, self._adapters = model, draft, adapters
        self._slots, self._queue = slots, queue
        self._draft_tokens = draft_tokens
        batch = max(BATCH, slots * (draft_tokens + 1))
        self._size = {"sequences": slots, "length": length, "batch": batch, "threads": threads}
        self._lanes: dict[str | None, Lane] = {}
        self._waiting: deque[tuple[str | None, Job]] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
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
            if len(self._waiting) >= self._queue:
                raise BusyError(f"{len(self._waiting)} requests are waiting already; try again in a moment")
            self._waiting.append((adapter, job))
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the scheduler's thread, between two batches, and return its value."""
        result: Future[T] = Future()
        with self._wake:
            if self._ended:
                raise self._ended
            self._calls.append((function, result))
            self._wake.notify()
        return result.result()

    def measure_costs(self) -> Costs:
        """Time base passes over 1 and k + 1 tokens (linear between) and a draft step, on this machine, now."""
        return self.call(self._measure_costs)

    def close(self) -> None:
        """End every job as cancelled and free the contexts."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # What follows runs on the scheduler's thread.

    def _run(self) -> None:
        try:
            while self._admit():
                for lane in list(self._lanes.values()):
                    lane.turn()
        finally:
            self._end(sys.exception())

    def _active(self) -> int:
        return sum(len(lane) for lane in list(self._lanes.values()))

    def _admit(self) -> bool:
        """Sleep while there is nothing to do, run calls, fill free slots; False when closing."""
        with self._wake:
            while not (self._active() or self._waiting or self._calls or self._closing):
                self._wake.wait()
            if self._closing:
                return False
        while self._calls:
            function, result = self._calls[0]
            try:
                result.set_result(function())
            except CogumiError as error:
                result.set_exception(error)
            self._calls.popleft()
        while self._waiting and self._active() < self._slots:
            adapter, job = self._waiting[0]
            try:
                self._lane(adapter).join(job)
            except CogumiError as error:
                job.fail(error)
            self._waiting.popleft()
        return True

    def _lane(self, adapter: str | None) -> Lane:
        lane = self._lanes.get(adapter)
        if lane is None:
            base = Context(self._model, adapter=self._adapters[adapter] if adapter else None, **self._size)
            draft = Context(self._draft, **self._size) if self._draft else None
            lane = self._lanes[adapter] = Lane(base, draft, self._model.tokenizer, self.acceptance)
        return lane

    def _end(self, error: BaseException | None) -> None:
        """Leave nobody waiting: answers end as cancelled, or with the error that ended the thread."""
        with self._wake:
            self._ended = RequestError(
                f"the engine has stopped ({error}); open it again" if error else "the engine is closed"
            )
            jobs = [job for lane in self._lanes.values() for job in lane.jobs]
            jobs += [job for _, job in self._waiting]
            self._waiting.clear()
            calls, self._calls = self._calls, deque()
        for job in jobs:
            if isinstance(job, Generation) and error is None:
                job.end("cancelled")
            else:
                job.fail(self._ended)
        for _, result in calls:
            result.set_exception(self._ended)
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

    def _measure_costs(self) -> Costs:
        lane, k = self._lane(None), self._draft_tokens
        one, many = _seconds(lane.base, 1), _seconds(lane.base, k + 1)
        draft = _seconds(lane.draft, 1) if lane.draft else 0.0
        return Costs(draft, tuple(one + (many - one) * i / max(k, 1) for i in range(k + 1)))


def _seconds(context: Context, tokens: int) -> float:
    """The fastest of four passes over so many tokens; the first, which warms up, is usually not."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        context.decode([Row(0, [0] * tokens, 0, tokens)])
        times.append(time.perf_counter() - began)
        context.trim(0, 0)
    return min(times)
