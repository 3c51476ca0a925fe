"""Runs the choices of one HTTP request in worker threads and passes their events to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeAlias, runtime_checkable

from cogumi.core.errors import RequestError
from cogumi.core.types import Decision, Reply, Request
from cogumi.engine.events import Outcome
from cogumi.engine.protocol import Engine, Event, missing_reply
from cogumi.serve.answer_hooks import Answered, AnswerHook
from cogumi.serve.problem import Problem, internal_error, problem_of

log = logging.getLogger(__name__)

ChoiceEvents: TypeAlias = AsyncGenerator[tuple[int, Event] | None]
"""Events of all choices, each with the index of its choice; None after a time without events."""
AT_ONCE = 8
"""Choices of one call that run at the same time, so that one call cannot fill the engine's queue for all others."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request for text: the data shared by its choices; `on_answer` receives each finished choice."""

    request_id: str
    model: str
    streamed: bool
    on_answer: AnswerHook


class _Choice:
    """One engine request of a call. `run` blocks its thread; `cancel` may be called from any thread."""

    def __init__(self, call: Call, engine: Engine, request: Request, post: Callable[[Outcome], None]) -> None:
        self._call, self._engine, self._request, self._post = call, engine, request, post
        self._events: Iterator[Event] | None = None
        self._cancelled = threading.Event()
        self._began = time.perf_counter()
        self._first: float | None = None

    def run(self) -> None:
        """Post every event, the reply or the error last, then call the hook."""
        try:
            end: Outcome = self._generate()
        except BaseException as failure:  # panics of native libraries are not an `Exception`
            end = failure if isinstance(failure, Exception) else RuntimeError(f"the engine crashed: {failure!r}")
        answered = self._answered(end)  # computed before posting, because the end may cancel all choices of the call
        try:
            self._post(end)  # before the hooks, so that no client waits for them
        finally:
            self._call.on_answer(answered)

    def cancel(self) -> None:
        """Stop the generation if it is still running."""
        self._cancelled.set()
        if self._events is not None:
            _close(self._events)

    def _generate(self) -> Reply:
        self._events = events = self._engine.generate(self._request)
        try:
            while not self._cancelled.is_set() and (event := next(events, None)) is not None:
                if self._first is None and not isinstance(event, Decision):
                    self._first = self._elapsed()
                if isinstance(event, Reply):
                    return event
                self._post(event)
        finally:
            _close(events)
        raise missing_reply()

    def _answered(self, end: Outcome) -> Answered:
        reply = end if isinstance(end, Reply) else None
        whole = reply is not None and reply.finish_reason != "cancelled"
        cancelled = not whole and (reply is not None or self._cancelled.is_set())
        return Answered(
            request_id=self._call.request_id,
            model=self._call.model,
            request=self._request,
            streamed=self._call.streamed,
            reply=reply,
            seconds=self._elapsed(),
            first_token_seconds=self._first,
            cancelled=cancelled,
            error=end if isinstance(end, Exception) and not cancelled else None,
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began


async def run_choices(
    call: Call, engine: Engine, requests: Sequence[Request], threads: Executor, keep_alive_seconds: float
) -> ChoiceEvents:
    """Run `requests`, `AT_ONCE` at a time; yield `(index, event)` in order of arrival.

    Yields None after each `keep_alive_seconds` without an event. Closing the generator cancels running requests.
    Raises `Problem`: a refusal by the engine, or 500 for a defect.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Outcome]] = asyncio.Queue()

    def post(index: int, outcome: Outcome) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (index, outcome))

    choices = [_Choice(call, engine, request, partial(post, index)) for index, request in enumerate(requests)]
    left, waiting = len(choices), iter(choices)
    try:
        for choice in islice(waiting, AT_ONCE):
            threads.submit(choice.run)
        while left:
            try:
                async with asyncio.timeout(keep_alive_seconds):
                    index, outcome = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(outcome, Exception):
                raise _problem(outcome) from outcome
            if isinstance(outcome, Reply):
                left -= 1
                for choice in islice(waiting, 1):
                    threads.submit(choice.run)
                if outcome.finish_reason == "cancelled":
                    raise Problem(503, "the server is shutting down; ask again", code="closing", retry=1)
            yield index, outcome
    finally:
        for choice in choices:
            choice.cancel()


async def collect(events: ChoiceEvents) -> list[Reply]:
    """Wait for the reply of every choice, in order of choice."""
    replies: dict[int, Reply] = {}
    async with contextlib.aclosing(events):
        async for item in events:
            if item is not None and isinstance(item[1], Reply):
                replies[item[0]] = item[1]
    return [replies[index] for index in sorted(replies)]


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


def _close(events: Iterator[Event]) -> None:
    """Cancel a generation from any thread; a generator that is executing stops at its next event."""
    if isinstance(events, _Closable):
        with contextlib.suppress(ValueError):  # "generator already executing"
            events.close()


def _problem(error: Exception) -> Problem:
    if isinstance(error, RequestError):
        return problem_of(error)
    log.error("the engine failed", exc_info=error)
    return internal_error()
