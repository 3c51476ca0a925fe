"""Iterator over the events of one answer; closing it cancels the request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from cogumi.core.types import Reply
from cogumi.engine.protocol import Event

Outcome: TypeAlias = Event | Exception
"""An event, or the error that ends the answer instead of its `Reply`."""


class Events:
    """Yields the results of `receive` until the `Reply`; closing or dropping it before that calls `cancel`.

    `receive` blocks until the next outcome; `cancel` may be called from any thread.
    """

    def __init__(self, receive: Callable[[], Outcome], cancel: Callable[[], object]) -> None:
        self._receive, self._cancel = receive, cancel
        self._done = False

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        outcome = self._receive()
        self._done = isinstance(outcome, (Reply, Exception))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """Cancel the request if it is still running."""
        if not self._done:
            self._done = True
            self._cancel()

    __del__ = close
