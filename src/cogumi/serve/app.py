"""The HTTP server: an ASGI application over a cascade, run by uvicorn (SPEC G1).

`create_app` makes a plain FastAPI application: applications can be mounted on it, and it can be mounted in others.
`serve` runs it on a bound port; requests get 503 until the bundle is loaded.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from cogumi.core.errors import CogumiError
from cogumi.core.packages import load as load_package
from cogumi.core.version import __version__
from cogumi.serve.access import Access
from cogumi.serve.answer_hooks import AnswerHook, AnswerHooks
from cogumi.serve.api_keys import KeyFile
from cogumi.serve.engine_host import EngineHost, ServedEngine
from cogumi.serve.error_handlers import add_error_handlers
from cogumi.serve.http_routes import (
    feedback_routes,
    modifier_routes,
    personal_routes,
    reading_routes,
    status_routes,
    text_routes,
)
from cogumi.serve.middleware import REQUEST_ID, BodyLimit, Hosts, PlainPaths, RequestIds

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Host names of a server that only this machine reaches."""
PAGE = "/ui"
"""Where the page is, below the server's own address."""


def create_app(
    load: Callable[[], ServedEngine],
    *,
    on_ready: Callable[[ServedEngine], None] = lambda engine: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    on_answer: Sequence[AnswerHook] = (),
    modifiers: Path | None = None,
    max_body_bytes: int = 4 * 2**20,
    keep_alive_seconds: float = 10.0,
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
    keys: KeyFile | None = None,
    own_login: Collection[str] = (),
) -> FastAPI:
    """Make an application that serves the engine opened by `load`, which runs in a thread after the start.

    `on_ready` or `on_failure` is called when loading ends; each hook of `on_answer` with every finished answer (see
    `Answered`). Clients may add modifiers from the folder `modifiers` (None: not allowed). Bodies above
    `max_body_bytes` are refused. An idle stream sends a comment every `keep_alive_seconds`. Only requests to one of
    `hosts` are answered (None: to any). Pages of `origins` (`http://localhost:3000`; `*`: all) may read the answers.
    With `keys` every request but those for health needs one of them; so do mounted applications, except those at a
    path of `own_login`, which check their callers themselves.
    """
    host = EngineHost(load, on_ready, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with host.open():
            yield

    routers = [
        status_routes(host),
        text_routes(host, AnswerHooks(on_answer), keep_alive_seconds),
        reading_routes(host),
        feedback_routes(host),
        personal_routes(host),
        modifier_routes(host, modifiers),
    ]
    paths = {route.path for router in routers for route in router.routes if isinstance(route, APIRoute)}
    middleware = [  # the first is the outermost; mounted applications are also behind it
        Middleware(RequestIds),
        *([Middleware(Hosts, names=hosts)] if hosts is not None else []),
        *([Middleware(CORSMiddleware, **_cross_origin(origins))] if origins else []),
        Middleware(PlainPaths, paths=paths),
        *([Middleware(Access, keys=keys, own_login=own_login)] if keys else []),
        Middleware(BodyLimit, max_bytes=max_body_bytes),
    ]
    app = FastAPI(title="cogumi", version=__version__, lifespan=lifespan, middleware=middleware)
    app.state.host = host
    add_error_handlers(app)
    for router in routers:
        app.include_router(router)
    return app


def _cross_origin(origins: Sequence[str]) -> dict[str, Any]:
    """The arguments of Starlette's CORS middleware for these origins."""
    shown = [REQUEST_ID, "retry-after", *(f"x-cogumi-{name}" for name in ("tier", "route", "p-correct"))]
    return {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": shown}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0 chooses a free one); raises `CogumiError` if the address cannot be bound."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        why = (
            f"cannot listen on {host}:{port}: {error.strerror}; stop the program that uses it, or choose another --port"
        )
        raise CogumiError(why) from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ip_address(listener.getsockname()[0]).is_loopback


def _own_name(listener: socket.socket) -> str:
    """The host name under which this machine reaches its own socket."""
    address = ip_address(listener.getsockname()[0])
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return str(address) if address.version == 4 else f"[{address}]"


def _check(certificate: tuple[Path, Path]) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*certificate)
    except OSError as error:
        files = f"{certificate[0]} and {certificate[1]}"
        why = error.strerror or str(error)
        raise CogumiError(
            f"HTTPS is not possible with {files}: {why}; give PEM files of a certificate and its key"
        ) from error


class _Server(uvicorn.Server):
    """Ends in steps: at the first signal new requests get 503, running ones have `grace` seconds, then they end with an
    error. A second Ctrl-C ends it at once.
    """

    def __init__(self, config: uvicorn.Config, host: EngineHost, grace: float) -> None:
        super().__init__(config)
        self._host, self._grace = host, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after a signal."""
        self._host.refuse()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self.server_state.tasks and not self.force_exit:
                    await asyncio.sleep(0.05)
        await self._host.stop()
        await super().shutdown(sockets)


def serve(
    load: Callable[[], ServedEngine],
    listener: socket.socket,
    on_ready: Callable[[ServedEngine], None],
    modifiers: Path | None = None,
    *,
    allowed_hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    grace: float,
    keys: KeyFile | None = None,
    certificate: tuple[Path, Path] | None = None,
    page: bool = False,
    root_path: str = "",
) -> None:
    """Serve on `listener` until a signal; raises the error of `load` if the bundle cannot be opened.

    On a loopback address only its own names and `allowed_hosts` are answered, elsewhere `allowed_hosts` if there are
    any. Running answers get `grace` seconds after the signal. `certificate`: PEM files of a TLS certificate and its
    private key. `page` mounts the page at /ui. A proxy may serve all
    of it below `root_path`, which it removes from the path of each request.
    """
    failures: list[BaseException] = []
    own = _own_name(listener)
    hosts = {*LOOPBACK, own, *allowed_hosts} if is_loopback(listener) or allowed_hosts else None

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        load,
        on_ready=on_ready,
        on_failure=fail,
        modifiers=modifiers,
        hosts=hosts,
        origins=origins,
        keys=keys,
        own_login=[PAGE] if page else (),
    )
    if page:
        url = f"{'https' if certificate else 'http'}://{own}:{listener.getsockname()[1]}"
        load_package("cogumi.serve.page.mounting", "the page").mount_page(
            app, PAGE, url, keys=keys, certificate=certificate and certificate[0]
        )
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=5, server_header=False, root_path=root_path
    )
    if certificate:
        _check(certificate)
        config.ssl_certfile, config.ssl_keyfile = certificate
    server = _Server(config, app.state.host, grace)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
