"""One place through which every finished answer passes: what metrics, telemetry and logs attach to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cogumi.core.types import Reply, Request

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """One finished choice of a request for text, streamed or whole, of chat or completions.

    `request_id` is the response's `x-request-id` (the same for all choices), `model` the name that the client gave,
    `request` what the engine was given (its `id` is the id under which the choice can be rated). `seconds` and
    `first_token_seconds` run from the time at which the server took the request on; the latter ends with the first
    event that carries text, and is None where none came. `cancelled` if the client disconnected or the server closed
    before the engine had finished, `error` if the engine refused or failed. `reply` is None after an error, and after
    a cancellation for which the engine gave no partial reply.
    """

    request_id: str
    model: str
    request: Request
    streamed: bool
    reply: Reply | None
    seconds: float
    first_token_seconds: float | None
    cancelled: bool = False
    error: Exception | None = None


AnswerHook: TypeAlias = Callable[[Answered], None]
"""Is called once for each finished choice, in a worker thread: several calls may run at the same time."""


class AnswerHooks:
    """Calls every hook in turn. A hook that raises is logged at its first failure, and breaks nothing."""

    def __init__(self, hooks: Sequence[AnswerHook]) -> None:
        self._hooks = tuple(hooks)
        self._failed: set[int] = set()

    def __call__(self, answered: Answered) -> None:
        """Pass one answer on."""
        for index, hook in enumerate(self._hooks):
            try:
                hook(answered)
            except Exception:
                if index not in self._failed:
                    self._failed.add(index)
                    log.warning("the answer hook %r failed; its later failures are not logged", hook, exc_info=True)
