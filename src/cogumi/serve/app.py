"""The HTTP server: an ASGI application over a cascade, run by uvicorn (SPEC G1).

`create_app` makes a plain FastAPI application: applications can be mounted on it, and it can be mounted in others.
`serve` runs it on a bound port; requests get 503 until the bundle is loaded.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from cogumi.core.errors import CogumiError
from cogumi.core.version import __version__
from cogumi.serve.answer_hooks import AnswerHook, AnswerHooks
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
from cogumi.serve.middleware import BodyLimit, RequestIds


def create_app(
    load: Callable[[], ServedEngine],
    *,
    on_ready: Callable[[ServedEngine], None] = lambda engine: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    on_answer: Sequence[AnswerHook] = (),
    modifiers: Path | None = None,
    max_body_bytes: int = 4 * 2**20,
    keep_alive_seconds: float = 10.0,
) -> FastAPI:
    """Make an application that serves the engine opened by `load`, which runs in a thread after the start.

    `on_ready` or `on_failure` is called when loading ends; each hook of `on_answer` with every finished answer (see
    `Answered`). Clients may add modifiers from the folder `modifiers` (None: not allowed). Bodies above
    `max_body_bytes` are refused. An idle stream sends a comment every `keep_alive_seconds`.
    """
    host = EngineHost(load, on_ready, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with host.open():
            yield

    middleware = [  # the first is the outermost; mounted applications are also behind it
        Middleware(RequestIds),
        Middleware(BodyLimit, max_bytes=max_body_bytes),
    ]
    app = FastAPI(title="cogumi", version=__version__, lifespan=lifespan, middleware=middleware)
    add_error_handlers(app)
    app.include_router(status_routes(host))
    app.include_router(text_routes(host, AnswerHooks(on_answer), keep_alive_seconds))
    app.include_router(reading_routes(host))
    app.include_router(feedback_routes(host))
    app.include_router(personal_routes(host))
    app.include_router(modifier_routes(host, modifiers))
    return app


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


def serve(
    load: Callable[[], ServedEngine],
    listener: socket.socket,
    on_ready: Callable[[ServedEngine], None],
    modifiers: Path | None = None,
) -> None:
    """Serve on `listener` until a signal; raises the error of `load` if the bundle cannot be opened."""
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(load, on_ready=on_ready, on_failure=fail, modifiers=modifiers)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False))
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
