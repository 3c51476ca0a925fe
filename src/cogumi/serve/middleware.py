"""ASGI middleware for all routes and mounted applications: request ids, hosts, spelling of paths, size of bodies."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogumi.serve.problem import Problem

_PORT, _SLASHES = re.compile(r":\d*$"), re.compile("//+")
REQUEST_ID = "x-request-id"
"""Response header with the id of the request."""


def request_id(scope: Scope) -> str:
    """The id of an HTTP request: the `request_id` of its state, generated at the first call.

    An id set by an outer application is kept.
    """
    return str(scope.setdefault("state", {}).setdefault("request_id", f"req_{uuid.uuid4().hex}"))


class RequestIds:
    """Adds the header `x-request-id` to every HTTP response, unless an inner application has set it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = (REQUEST_ID.encode(), request_id(scope).encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if all(name.lower() != header[0] for name, _ in headers):
                    message["headers"] = [*headers, header]
            await send(message)

        await self.app(scope, receive, send_with_id)


class Hosts:
    """Refuses HTTP requests whose header `Host` names none of `names`, with 403.

    A page of another site can point its own name at a loopback address and then read what a server without keys says
    (DNS rebinding); the browser sends that name as the host.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = _PORT.sub("", given)
            if given and name not in self.names:  # a browser always sends it
                what = f"this server does not answer for the host {name!r}; start it with --allow-host {name}"
                await Problem(403, what, code="host_not_allowed").response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class PlainPaths:
    """Reads double slashes in a path as one, and routes of `paths` also with a slash at their end.

    Clients join a base URL and a path in all ways: `http://host/v1/` and `/models`.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            path = _SLASHES.sub("/", scope["path"])
            if path.endswith("/") and path[:-1].removeprefix(scope.get("root_path", "")) in self.paths:
                path = path[:-1]
            if path != scope["path"]:
                scope = dict(scope, path=path, raw_path=quote(path).encode("ascii"))
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses HTTP requests with a body above `max_bytes`; reads the whole body before the application runs."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more and len(body) <= self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.max_bytes:
            what = f"the request body is larger than {self.max_bytes} bytes; send a smaller one"
            await Problem(413, what).response(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)
