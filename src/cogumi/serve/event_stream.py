"""Bridges the engines' blocking iterators into the event loop, and their events into server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol, TypeAlias, runtime_checkable

from cogumi.core.errors import RequestError
from cogumi.core.types import Reply, Request, Token, Usage
from cogumi.engine.protocol import Engine, Event
from cogumi.engine.stream_text import further
from cogumi.serve.problem import Problem, internal_error, problem_of
from cogumi.serve.request_body import Shape

log = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

Live: TypeAlias = AsyncGenerator[tuple[int, Event] | None]


async def live(engine: Engine, requests: Sequence[Request], threads: Executor, pulse: float) -> Live:
    """Run `requests` side by side, a thread each; yield `(index, event)` as they come, None when idle.

    None comes after each `pulse` seconds without an event. Closing the generator cancels what still runs.
    Raises `Problem`: an engine's refusal, or 500 for its defect.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
    gone = threading.Event()
    open_events: dict[int, Iterator[Event]] = {}

    def drain(index: int, request: Request) -> None:
        def post(event: Event | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        try:
            open_events[index] = events = engine.generate(request)
            for event in events:
                if gone.is_set():
                    break
                post(event)
            _close(events)
        finally:
            post(None)

    work = [loop.run_in_executor(threads, drain, index, request) for index, request in enumerate(requests)]
    for job in work:
        job.add_done_callback(_seen)
    running = len(work)
    try:
        while running:
            try:
                index, event = await asyncio.wait_for(queue.get(), pulse)
            except TimeoutError:
                yield None
                continue
            if event is None:
                running -= 1
                await asyncio.wait([work[index]])
                if error := work[index].exception():
                    raise _problem(error) from error
            elif isinstance(event, Reply) and event.finish_reason == "cancelled":
                raise Problem(503, "the server is shutting down; ask again", code="closing", retry=True)
            else:
                yield index, event
    finally:
        gone.set()
        for events in list(open_events.values()):
            _close(events)


def _seen(job: asyncio.Future[None]) -> None:
    """Take note of an error that nobody waits for any more, so that asyncio does not complain."""
    if not job.cancelled():
        job.exception()


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


def _close(events: Iterator[Event]) -> None:
    """Cancel a generation, from any thread; one that cannot be closed while it works stops at its next event."""
    if isinstance(events, _Closable):
        with contextlib.suppress(ValueError):  # "generator already executing"
            events.close()


def _problem(error: BaseException) -> Problem:
    if isinstance(error, RequestError):
        return problem_of(error)
    log.error("the engine failed", exc_info=error)
    return internal_error()


async def collect(events: Live) -> list[Reply]:
    """Wait for the reply of every choice, in order of choice."""
    replies: dict[int, Reply] = {}
    async with contextlib.aclosing(events):
        async for item in events:
            if item is not None and isinstance(item[1], Reply):
                replies[item[0]] = item[1]
    return [replies[index] for index in sorted(replies)]


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def server_sent(events: Live, shape: Shape) -> AsyncGenerator[str]:
    """The lines of a stream, ending with `[DONE]`.

    A `Problem` before the first line is raised, so that it can become an HTTP status; a later one is data.
    """
    sent: dict[int, str] = {}
    usage = Usage()
    begun = False
    try:
        async with contextlib.aclosing(events):
            async for item in events:
                lines = [KEEP_ALIVE] if item is None else [_data(c) for c in _chunks(*item, sent, shape)]
                if item is not None and isinstance(item[1], Reply):
                    usage += item[1].usage
                for line in lines:
                    begun = True
                    yield line
    except Problem as problem:
        if not begun:
            raise
        yield _data(problem.body)
    else:
        if shape.include_usage:
            yield _data(shape.usage_chunk(usage))
    yield DONE


def _chunks(index: int, event: Event, sent: dict[int, str], shape: Shape) -> list[dict[str, Any]]:
    """What one event adds to the stream of choice `index`; `sent` holds each choice's text so far."""
    text, whole = further(sent.get(index, ""), event)
    first, reply = index not in sent, event if isinstance(event, Reply) else None
    tokens: tuple[Token, ...] = (event,) if isinstance(event, Token) else ()
    if reply and first:  # nothing was streamed: all comes at once
        tokens = reply.tokens
    if not (text or reply or (tokens and shape.wants_tokens)):
        return []
    sent[index] = whole
    return shape.chunks(index, text, tokens, first=first, reply=reply)
