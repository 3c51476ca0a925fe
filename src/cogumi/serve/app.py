"""The HTTP server: OpenAI's models, chat, completions and embeddings over a cascade; its tokenizer; health, readiness.

`serve` takes a port that is already bound, and answers 503 until the bundle is loaded.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Reply
from cogumi.core.types import Request as EngineRequest
from cogumi.core.version import __version__
from cogumi.engine.protocol import Engine, Tokenizer
from cogumi.serve.chat_completions import ChatRequest, ChatShape
from cogumi.serve.completions import CompletionRequest, CompletionShape
from cogumi.serve.embeddings import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from cogumi.serve.event_stream import collect, live, server_sent
from cogumi.serve.middleware import GONE, Edge, Stream, refusal, unless_gone
from cogumi.serve.problem import Problem, internal_error, problem_of
from cogumi.serve.request_body import Feedback, Shape, answer_id, model_object

LIVE_REQUESTS = 128
"""Generations held at once, a thread each; how many of them run is the engine's business."""


class Served(Engine, Protocol):
    """An engine that goes by several model names, as a cascade does."""

    @property
    def models(self) -> Sequence[str]:
        """Every name a client may ask for."""

    def resolve(self, model: str, request: EngineRequest) -> tuple[Engine, EngineRequest]:
        """The engine behind one of `models`, and the request as that engine takes it."""

    def feedback(self, id: str, right: bool, user: str | None = None) -> None:
        """Take note of whether an answer was right."""


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

    def engine(self, model: str) -> Engine:
        """The engine that answers under that name."""
        return self.named(model).resolve(model, EngineRequest())[0]

    def tokenizer(self, model: str | None) -> Tokenizer:
        """The tokenizer of a model, of the base if none is named."""
        return self.engine(model).tokenizer if model else self.cascade.tokenizer

    def close(self) -> None:
        """Free the cascade; requests that still run end as cancelled."""
        if self.loaded is not None:
            self.loaded.close()
        self.threads.shutdown(cancel_futures=True)


def _handle_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape and a true status."""

    @app.exception_handler(Problem)
    async def refused(_: Request, problem: Problem) -> JSONResponse:
        return refusal(problem)

    @app.exception_handler(RequestError)
    async def engine_refused(_: Request, error: RequestError) -> JSONResponse:
        return refusal(problem_of(error))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return refusal(internal_error())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refusal(Problem(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
        what = first["msg"].removeprefix("Value error, ")
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return refusal(Problem(400, f"{param}: {what}" if param else what, param=param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        response = refusal(Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response


def _headers(reply: Reply) -> dict[str, str]:
    """Who answered and how sure it is, for clients that look no further than the headers."""
    headers = {
        "x-cogumi-tier": quote(reply.tier, safe=" +:>,/-"),
        "x-cogumi-route": quote(reply.route, safe=" +:>,/-"),
    }
    return headers | ({} if reply.p_correct is None else {"x-cogumi-p-correct": f"{reply.p_correct:.4f}"})


def _add_routes(app: FastAPI, home: _Home) -> None:
    """What is there, and whether it can be asked yet."""

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


def _add_text_routes(app: FastAPI, home: _Home, keep_alive_seconds: float) -> None:
    """What writes text."""

    async def answered(request: Request, body: ChatRequest | CompletionRequest) -> Response:
        cascade, asked = home.named(body.model), body.requests()
        engine = cascade.resolve(body.model, asked[0])[0]
        shape: Shape
        if isinstance(body, ChatRequest):
            shape = ChatShape(body, engine.tokenizer)
        else:
            shape = CompletionShape(body, asked, engine.tokenizer)
        named = [replace(one, id=answer_id(shape.head["id"], index)) for index, one in enumerate(asked)]
        requests = [cascade.resolve(body.model, one)[1] for one in named]
        events = live(engine, requests, home.threads, keep_alive_seconds)
        if body.stream:
            lines = server_sent(events, shape)
            first = await unless_gone(request, _first(lines))
            return GONE if first is None else Stream(first, lines)
        replies = await unless_gone(request, collect(events))
        return GONE if replies is None else JSONResponse(shape.completion(replies), headers=_headers(replies[0]))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of chunks."""
        return await answered(request, body)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from raw prompts, whole or as a stream of chunks."""
        return await answered(request, body)


def _add_reading_routes(app: FastAPI, home: _Home) -> None:
    """What only reads text."""

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """One vector per text: the mean hidden state of its tokens."""
        engine = home.engine(body.model)
        texts = body.texts(engine.tokenizer)
        tokens = sum(len(engine.tokenizer.encode(text)) for text in texts)
        rows = await asyncio.get_running_loop().run_in_executor(home.threads, engine.embed, texts)
        return body.answer(rows, tokens)

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, str | None]:
        """The special tokens and the chat template."""
        return dict(home.tokenizer(model).settings)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"tokens": body.ids(home.tokenizer(body.model))}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Text of ids, special tokens left out."""
        return {"prompt": home.tokenizer(body.model).decode(body.tokens)}


def _add_feedback_route(app: FastAPI, home: _Home) -> None:
    """What users say about answers."""

    @app.post("/v1/feedback", status_code=204, response_class=Response)
    async def feedback(body: Feedback) -> None:
        """An answer was right or wrong; its id is that of the completion, with `-1` and so on for further choices."""
        rate = home.cascade.feedback
        try:
            await asyncio.get_running_loop().run_in_executor(home.threads, rate, body.id, body.right, body.user)
        except RequestError as error:
            raise Problem(404, str(error), code="answer_not_found", param="id") from error


async def _first(lines: AsyncGenerator[str]) -> str:
    return await anext(lines)


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
    _add_routes(app, home)
    _add_text_routes(app, home, keep_alive_seconds)
    _add_reading_routes(app, home)
    _add_feedback_route(app, home)
    return Edge(app, max_body_bytes)


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
