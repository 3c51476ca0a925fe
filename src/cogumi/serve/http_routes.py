"""The HTTP routes: OpenAI's models, chat, completions and embeddings; tokenizer, feedback, health and readiness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cogumi.core.errors import RequestError
from cogumi.core.types import Reply
from cogumi.serve.answer_hooks import AnswerHook
from cogumi.serve.chat_completions import ChatRequest, ChatResponseBuilder
from cogumi.serve.choices import Call, collect, run_choices
from cogumi.serve.completions import CompletionRequest, CompletionResponseBuilder
from cogumi.serve.disconnects import CLIENT_CLOSED_REQUEST, ClosingStream, unless_disconnected
from cogumi.serve.embeddings import EmbeddingRequest
from cogumi.serve.engine_host import EngineHost
from cogumi.serve.event_stream import server_sent
from cogumi.serve.middleware import request_id
from cogumi.serve.problem import Problem
from cogumi.serve.request_body import Feedback, ResponseBuilder, answer_id, model_object
from cogumi.serve.tokenizer_api import DetokenizeRequest, TokenizeRequest


def status_routes(host: EngineHost) -> APIRouter:
    """Which models there are, and whether they can be asked yet."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive, whether or not the bundle is loaded."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 once requests can be answered, 503 before."""
        return {"status": "ready", "models": list(host.engine.models)}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every name a request may give as `model`: the cascade, its modes, its tiers."""
        return {"object": "list", "data": [model_object(name, host.created) for name in host.engine.models]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        host.serving(name)
        return model_object(name, host.created)

    return router


def text_routes(host: EngineHost, on_answer: AnswerHook, keep_alive_seconds: float) -> APIRouter:
    """Chat and completions; `on_answer` gets every finished choice."""
    router = APIRouter()

    async def answer(http: Request, body: ChatRequest | CompletionRequest) -> Response:
        served, asked = host.serving(body.model), body.requests()
        engine = served.resolve(body.model, asked[0])[0]
        builder: ResponseBuilder
        if isinstance(body, ChatRequest):
            builder = ChatResponseBuilder(body, engine.tokenizer)
        else:
            builder = CompletionResponseBuilder(body, asked, engine.tokenizer)
        with_ids = [replace(one, id=answer_id(builder.head["id"], index)) for index, one in enumerate(asked)]
        requests = [served.resolve(body.model, one)[1] for one in with_ids]
        call = Call(request_id(http.scope), body.model, bool(body.stream), on_answer)
        events = run_choices(call, engine, requests, host.threads, keep_alive_seconds)
        if body.stream:
            lines = server_sent(events, builder)
            first = await unless_disconnected(http, _first(lines))
            return CLIENT_CLOSED_REQUEST if first is None else ClosingStream(first, lines)
        replies = await unless_disconnected(http, collect(events))
        if replies is None:
            return CLIENT_CLOSED_REQUEST
        return JSONResponse(builder.completion(replies), headers=_headers(replies[0]))

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of chunks."""
        return await answer(request, body)

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue raw prompts, whole or as a stream of chunks."""
        return await answer(request, body)

    return router


def reading_routes(host: EngineHost) -> APIRouter:
    """Embeddings and the tokenizer, which write no text."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """One vector per text: the mean hidden state of its tokens."""
        engine = host.resolved(body.model)
        texts = body.texts(engine.tokenizer)
        tokens = sum(len(engine.tokenizer.encode(text)) for text in texts)
        rows = await asyncio.get_running_loop().run_in_executor(host.threads, engine.embed, texts)
        return body.answer(rows, tokens)

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, str | None]:
        """The special tokens and the chat template."""
        return dict(host.tokenizer(model).settings)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"tokens": body.ids(host.tokenizer(body.model))}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Text of ids, special tokens left out."""
        return {"prompt": host.tokenizer(body.model).decode(body.tokens)}

    return router


def feedback_routes(host: EngineHost) -> APIRouter:
    """Ratings of answers by their users."""
    router = APIRouter()

    @router.post("/v1/feedback", status_code=204, response_class=Response)
    async def feedback(body: Feedback) -> None:
        """An answer was right or wrong; its id is that of the completion, with `-1` and so on for further choices."""
        rate = host.engine.feedback
        try:
            await asyncio.get_running_loop().run_in_executor(host.threads, rate, body.id, body.right, body.user)
        except RequestError as error:
            raise Problem(404, str(error), code="answer_not_found", param="id") from error

    return router


async def _first(lines: AsyncGenerator[str]) -> str:
    return await anext(lines)


def _headers(reply: Reply) -> dict[str, str]:
    """Which tier answered and how sure it is, for clients that read headers only."""
    headers = {
        "x-cogumi-tier": quote(reply.tier, safe=" +:>,/-"),
        "x-cogumi-route": quote(reply.route, safe=" +:>,/-"),
    }
    return headers | ({} if reply.p_correct is None else {"x-cogumi-p-correct": f"{reply.p_correct:.4f}"})
