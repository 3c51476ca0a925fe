"""What lies between the routes and the socket: request ids, a limit on bodies, and clients that hang up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogumi.serve.problem import Problem

T = TypeVar("T")

GONE = Response(status_code=499)
"""Sent to nobody: the client hung up before its answer."""


def refusal(problem: Problem) -> JSONResponse:
    """The response that says so."""
    return JSONResponse(problem.body, problem.status, headers=problem.headers)


class Edge:
    """Outermost layer: gives every response an `x-request-id` and refuses bodies above `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, its body read whole first."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}".encode()

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        body, more = bytearray(), True
        while more and len(body) <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.limit:
            what = f"the request body is larger than {self.limit} bytes; send a shorter conversation"
            await refusal(Problem(413, what))(scope, receive, stamped)
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, stamped)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client hangs up first (`work` is then cancelled)."""
    task = asyncio.ensure_future(work)
    hangup = asyncio.ensure_future(_hangup(request))
    try:
        await asyncio.wait((task, hangup), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        hangup.cancel()
        await asyncio.gather(task, hangup, return_exceptions=True)


async def _hangup(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A stream that closes its source however it ends, so that a client that goes away frees its slot."""

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
