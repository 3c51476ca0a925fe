"""Runs a generator of events in a worker thread for a consumer in another one, who may cancel at any time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor
from contextlib import closing
from typing import TypeAlias, cast

from cogumi.core.types import Reply, Usage
from cogumi.engine.protocol import Event

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
    raise RuntimeError("an engine ended a generation without a Reply: a defect in that engine")


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


class Events:
    """The consumer's end: submits `flow` to `pool` at once and yields its events, the reply last.

    Closing or dropping it cancels the flow; `stopped` (asked between events) ends it with a cancelled reply.
    What the flow raises is raised here. `ended` is called once the flow is over, whatever became of it.
    """

    def __init__(self, flow: Flow, pool: Executor, stopped: Callable[[], bool], ended: Callable[[], object]) -> None:
        self._done = False
        self._channel = _Channel()
        self._future = pool.submit(_drive, flow, self._channel, stopped)
        self._future.add_done_callback(lambda _: ended())

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Event:
        event = None if self._done else self._channel.events.get()
        if event is None:
            if not self._done:
                self._done = True
                self._future.result()
            raise StopIteration
        return event

    def close(self) -> None:
        """Cancel the flow if it still runs."""
        self._done = True
        self._channel.gone.set()

    __del__ = close
