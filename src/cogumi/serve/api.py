"""The HTTP server: OpenAI's model list and chat completions over a cascade, plus health and readiness.

`serve` takes a port that is already bound, and answers 503 until the bundle is loaded.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogumi import __version__
from cogumi.errors import CogumiError, RequestError
from cogumi.runtime.engine import Engine
from cogumi.serve.schema import ChatRequest, Problem, Shape, internal_error, model_object, problem_of
from cogumi.serve.stream import collect, live, server_sent
from cogumi.types import Reply
from cogumi.types import Request as EngineRequest

T = TypeVar("T")

LIVE_REQUESTS = 128
"""Generations held at once, a thread each; how many of them run is the engine's business."""


class Served(Engine, Protocol):
    """An engine that goes by several model names, as a cascade does."""

    @property
    def models(self) -> Sequence[str]:
        """Every name a client may ask for."""

    def resolve(self, model: str, request: EngineRequest) -> tuple[Engine, EngineRequest]:
        """The engine behind one of `models`, and the request as that engine takes it."""


class _Edge:
    """Outermost layer: gives every response an `x-request-id` and refuses bodies above `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await _refusal(Problem(413, what))(scope, receive, stamped)
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replayed, stamped)


class _Home:
    """What the routes share: the cascade once it is loaded, or why it is not."""

    def __init__(self) -> None:
        self.loaded: Served | None = None
        self.failure: BaseException | None = None
        self.threads = ThreadPoolExecutor(LIVE_REQUESTS, thread_name_prefix="request")
        self.since = int(time.time())

    @property
    def cascade(self) -> Served:
        """The loaded cascade; raises `Problem` 503 until it is there."""
        if self.loaded is None:
            why = f"the bundle could not be opened: {self.failure}" if self.failure else "the bundle is still loading"
            raise Problem(503, why, code="not_ready", retry=self.failure is None)
        return self.loaded

    def named(self, model: str) -> Served:
        """The cascade if it knows `model`; raises `Problem` 404 with the names it knows."""
        if model not in self.cascade.models:
            what = f"the model {model!r} does not exist; there are: {', '.join(self.cascade.models)}"
            raise Problem(404, what, code="model_not_found", param="model")
        return self.cascade

    def close(self) -> None:
        """Free the cascade; requests that still run end as cancelled."""
        if self.loaded is not None:
            self.loaded.close()
        self.threads.shutdown(cancel_futures=True)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
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


class _Stream(StreamingResponse):
    """A stream that closes its source however it ends, so that a client that goes away frees its slot."""

    def __init__(self, first: str, lines: AsyncGenerator[str]) -> None:
        async def body() -> AsyncGenerator[str]:
            yield first
            async for line in lines:
                yield line

        super().__init__(body(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


def _refusal(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.body, problem.status, headers=problem.headers)


def _handle_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape and a true status."""

    @app.exception_handler(Problem)
    async def refused(_: Request, problem: Problem) -> JSONResponse:
        return _refusal(problem)

    @app.exception_handler(RequestError)
    async def engine_refused(_: Request, error: RequestError) -> JSONResponse:
        return _refusal(problem_of(error))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _refusal(internal_error())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _refusal(Problem(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
        what = first["msg"].removeprefix("Value error, ")
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return _refusal(Problem(400, f"{param}: {what}" if param else what, param=param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        response = _refusal(Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response


def _headers(reply: Reply) -> dict[str, str]:
    """Who answered and how sure it is, for clients that look no further than the headers."""
    headers = {
        "x-cogumi-tier": quote(reply.tier, safe=" +:>,/-"),
        "x-cogumi-route": quote(reply.route, safe=" +:>,/-"),
    }
    return headers | ({} if reply.p_correct is None else {"x-cogumi-p-correct": f"{reply.p_correct:.4f}"})


def _add_routes(app: FastAPI, home: _Home, keep_alive_seconds: float) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive, whether or not the bundle is loaded."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 once requests can be answered, 503 before."""
        return {"status": "ready", "models": list(home.cascade.models)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every name a request may give as `model`: the cascade, its modes, its tiers."""
        return {"object": "list", "data": [model_object(name, home.since) for name in home.cascade.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        home.named(name)
        return model_object(name, home.since)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of chunks."""
        cascade = home.named(body.model)
        resolved = [cascade.resolve(body.model, one) for one in body.requests()]
        engine = resolved[0][0]
        shape = Shape(body, engine.tokenizer)
        events = live(engine, [one for _, one in resolved], home.threads, keep_alive_seconds)
        if body.stream:
            lines = server_sent(events, shape)
            first = await _unless_gone(request, _first(lines))
            return _GONE if first is None else _Stream(first, lines)
        replies = await _unless_gone(request, collect(events))
        return _GONE if replies is None else JSONResponse(shape.completion(replies), headers=_headers(replies[0]))


async def _first(lines: AsyncGenerator[str]) -> str:
    return await anext(lines)


_GONE = Response(status_code=499)
"""Sent to nobody: the client hung up before its answer."""


def create_app(
    load: Callable[[], Served],
    *,
    on_ready: Callable[[Served], None] = lambda cascade: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    max_body_bytes: int = 4 * 2**20,
    keep_alive_seconds: float = 10.0,
) -> ASGIApp:
    """The web application over the cascade that `load` opens, in a thread, once the application runs."""
    home = _Home()

    def opened(task: asyncio.Task[Served]) -> None:
        if error := task.exception():
            home.failure = error
            on_failure(error)
        else:
            home.loaded = task.result()
            on_ready(home.loaded)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        task = asyncio.create_task(asyncio.to_thread(load))
        task.add_done_callback(opened)
        yield
        await asyncio.wait([task])
        home.close()

    app = FastAPI(title="cogumi", version=__version__, lifespan=lifespan)
    _handle_errors(app)
    _add_routes(app, home, keep_alive_seconds)
    return _Edge(app, max_body_bytes)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0 takes a free one); raises `CogumiError` if the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        why = f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it, or choose another --port"
        raise CogumiError(why) from error
    return listener


def serve(load: Callable[[], Served], listener: socket.socket, on_ready: Callable[[Served], None]) -> None:
    """Serve on `listener` until a signal; raises what `load` raised if the bundle cannot be opened."""
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(load, on_ready=on_ready, on_failure=fail)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False))
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
