"""Runs a generator of events in a worker thread; the consumer in another thread may cancel at any time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from contextlib import closing
from typing import TypeAlias, cast

from cogumi.core.types import Reply, Usage
from cogumi.engine.events import Events, Outcome
from cogumi.engine.protocol import Event, missing_reply

Flow: TypeAlias = Generator[Event | None, None, Reply]
"""Yields the events of one request, and None during other work (to check for a cancel); returns the reply."""


def as_flow(events: Iterator[Event], *, live: bool) -> Flow:
    """Convert a generation to a flow; its events are passed on only if `live`. Closing the flow cancels it."""
    with closing(cast(Generator[Event, None, None], events)):
        for event in events:
            if isinstance(event, Reply):
                return event
            yield event if live else None
    raise missing_reply()


class _Channel:
    """Shared state of worker and consumer: the events (None is the end) and whether the consumer cancelled."""

    __slots__ = ("cancelled", "events")

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()


def _drive(flow: Flow, channel: _Channel, stopped: Callable[[], bool]) -> None:
    try:
        with closing(flow):
            while not channel.cancelled.is_set():
                if stopped():
                    channel.events.put(Reply("", (), "cancelled", Usage()))
                    return
                try:
                    event = next(flow)
                except StopIteration as end:
                    channel.events.put(cast(Reply, end.value))
                    return
                if event is not None:
                    channel.events.put(event)
    finally:
        channel.events.put(None)


def start(flow: Flow, pool: Executor, stopped: Callable[[], bool], on_end: Callable[[], object]) -> Events:
    """Submit `flow` to `pool`; the result yields its events, the reply last, or raises the error of the flow.

    Closing or dropping the result cancels the flow. `stopped` is checked between events; True ends the flow with a
    cancelled reply. `on_end` is called at the end of the flow, on success or failure.
    """
    channel = _Channel()
    future = pool.submit(_drive, flow, channel, stopped)
    future.add_done_callback(lambda _: on_end())

    def receive() -> Outcome:
        event = channel.events.get()
        if event is not None:
            return event
        error = future.exception()
        return error if isinstance(error, Exception) else missing_reply()

    return Events(receive, channel.cancelled.set)
