"""ASGI middleware: a request needs a valid API key and stays within the limits of its key (SPEC G6)."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogumi.core.errors import CogumiError
from cogumi.serve.api_keys import Key, KeyFile
from cogumi.serve.problem import Problem
from cogumi.serve.rate_limits import Meter

OPEN = frozenset({"/health", "/ready"})
"""Paths that need no key."""


class Access:
    """Lets HTTP requests with a key of `keys` through; a refused or failed one does not count against the limits.

    Paths below one of `own_login` need no key: the applications there check their callers themselves.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile, own_login: Collection[str] = ()) -> None:
        self.app, self.keys = app, keys
        self._own_login = own_login
        self._meters: dict[str, Meter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN or self._logs_in(path):
            await self.app(scope, receive, send)
            return
        try:
            meter = self._meter(_secret(scope))
            meter.take_request()
        except Problem as problem:
            await problem.response(scope, receive, send)
            return
        scope.setdefault("state", {})["meter"] = meter

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    meter.give_back(requests=1)
                MutableHeaders(scope=message).update(meter.headers)
            await send(message)

        await self.app(scope, receive, counted)

    def _logs_in(self, path: str) -> bool:
        return any(path == own or path.startswith(f"{own}/") for own in self._own_login)

    def _meter(self, secret: str | None) -> Meter:
        if secret is None:
            what = "this server needs an API key: send the header Authorization: Bearer KEY"
            raise Problem(401, what, code="invalid_api_key")
        try:
            key = self.keys.find(secret)
        except CogumiError as error:
            raise Problem(503, "the server cannot check API keys now; ask its operator", code="keys") from error
        if key is None:
            raise Problem(401, "this API key is not valid, or was revoked", code="invalid_api_key")
        if key.sha256 not in self._meters:
            self._meters[key.sha256] = Meter(key)
        return self._meters[key.sha256]


def meter_of(scope: Scope) -> Meter | None:
    """The meter of a request's key; None for a server without keys."""
    found: Meter | None = scope.get("state", {}).get("meter")
    return found


def owner(scope: Scope, user: str | None) -> str | None:
    """The user whose data a request may touch: with keys one of the key's own, whatever name the request gives."""
    meter = meter_of(scope)
    if meter is None:
        return user
    key: Key = meter.key
    return f"{key.name}/{user}" if user else key.name


def _secret(scope: Scope) -> str | None:
    """The key of the header `Authorization: Bearer KEY`."""
    given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    kind, _, secret = given.partition(" ")
    return secret.strip() if kind.lower() == "bearer" and secret.strip() else None
