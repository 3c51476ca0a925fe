"""Cancels the work for a request when its client disconnects, to free its slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = Response(status_code=499)
"""Placeholder response after the client disconnected; it is not sent."""


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client disconnects first (`work` is then cancelled)."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ClosingStream(StreamingResponse):
    """Server-sent events from `first` and `lines`; always closes `lines` at the end of the response."""

    def __init__(self, first: str, lines: AsyncGenerator[str]) -> None:
        async def body() -> AsyncGenerator[str]:
            yield first
            async for line in lines:
                yield line

        super().__init__(body(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()
