"""Hooks that receive every finished answer, for metrics, telemetry and logs."""

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

    `request_id`: the response's `x-request-id` (the same for all choices). `model`: the model name in the request.
    `request`: the request to the engine (its `id` is the id for ratings). `seconds` and `first_token_seconds`: time
    from accepting the request until the end and until the first event with text (None without one). `cancelled`: the
    client disconnected or the server closed before the engine had finished. `error`: the engine refused or failed.
    `reply`: None after an error, and after a cancellation without a partial reply.
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
"""Called once for each finished choice, in a worker thread; several calls may run at the same time."""


class AnswerHooks:
    """Calls every hook in turn. The first exception of a hook is logged; exceptions have no other effect."""

    def __init__(self, hooks: Sequence[AnswerHook]) -> None:
        self._hooks = tuple(hooks)
        self._failed: set[int] = set()

    def __call__(self, answered: Answered) -> None:
        """Pass one answer to all hooks."""
        for index, hook in enumerate(self._hooks):
            try:
                hook(answered)
            except Exception:
                if index not in self._failed:
                    self._failed.add(index)
                    log.warning("the answer hook %r failed; its later failures are not logged", hook, exc_info=True)
