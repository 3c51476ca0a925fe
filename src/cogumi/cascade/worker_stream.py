"""Runs a generator of events in a worker thread for a consumer in another one, who may cancel at any time."""

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
"""Events of one request, None where work goes on without one (so that a cancel is noticed), and the final
reply.
"""


def answered(events: Iterator[Event], *, live: bool) -> Flow:
    """A generation as a flow; its tokens pass on only if `live`. Closing the flow cancels it."""
    with closing(cast(Generator[Event, None, None], events)):
        for event in events:
            if isinstance(event, Reply):
                return event
            yield event if live else None
    raise missing_reply()


class _Channel:
    """What both ends share: events (None ends them) and whether the consumer has gone."""

    __slots__ = ("events", "gone")

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.gone = threading.Event()


def _drive(flow: Flow, channel: _Channel, stopped: Callable[[], bool]) -> None:
    try:
        with closing(flow):
            while not channel.gone.is_set():
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


def start(flow: Flow, pool: Executor, stopped: Callable[[], bool], ended: Callable[[], object]) -> Events:
    """Submit `flow` to `pool` at once; the result yields its events, the reply last, or raises what the flow raises.

    Closing or dropping the result cancels the flow; `stopped` (asked between events) ends it with a cancelled reply.
    `ended` is called once the flow is over, however it ended.
    """
    channel = _Channel()
    future = pool.submit(_drive, flow, channel, stopped)
    future.add_done_callback(lambda _: ended())

    def receive() -> Outcome:
        event = channel.events.get()
        if event is not None:
            return event
        error = future.exception()
        return error if isinstance(error, Exception) else missing_reply()

    return Events(receive, channel.gone.set)
