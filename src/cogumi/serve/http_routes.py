"""HTTP routes: OpenAI's models, chat, completions, embeddings; tokenizer, feedback, modifiers, health, readiness."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.types import Reply
from cogumi.serve.access import meter_of, owner
from cogumi.serve.answer_hooks import AnswerHook
from cogumi.serve.chat_completions import ChatRequest, ChatResponseBuilder
from cogumi.serve.choices import Call, collect, run_choices
from cogumi.serve.completions import CompletionRequest, CompletionResponseBuilder
from cogumi.serve.disconnects import CLIENT_CLOSED_REQUEST, ClosingStream, unless_disconnected
from cogumi.serve.embeddings import EmbeddingRequest, embedded
from cogumi.serve.engine_host import EngineHost
from cogumi.serve.event_stream import server_sent
from cogumi.serve.metering import metered, prompt_sizes
from cogumi.serve.middleware import request_id
from cogumi.serve.problem import Problem
from cogumi.serve.request_body import (
    Feedback,
    NewModifier,
    PersonalChoice,
    ResponseBuilder,
    answer_id,
)
from cogumi.serve.tokenizer_api import DetokenizeRequest, TokenizeRequest


def status_routes(host: EngineHost) -> APIRouter:
    """Health, readiness and the list of models."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process is alive, even if the bundle is not loaded."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        """200 once requests can be answered, 503 before."""
        return {"status": "ready", "models": list(host.engine.models)}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Every valid value of `model`: the cascade, its modes, its tiers."""
        return {"object": "list", "data": [host.model_object(name) for name in host.engine.models]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        host.serving(name)
        return host.model_object(name)

    return router


def text_routes(host: EngineHost, on_answer: AnswerHook, keep_alive_seconds: float) -> APIRouter:
    """Chat and completions; `on_answer` receives every finished choice."""
    router = APIRouter()

    async def answer(http: Request, body: ChatRequest | CompletionRequest) -> Response:
        engine = host.resolved(body.model)
        builder: ResponseBuilder
        asked = body.requests(engine.tokenizer)
        if isinstance(body, ChatRequest):
            builder = ChatResponseBuilder(body, engine.tokenizer)
        else:
            builder = CompletionResponseBuilder(body, asked, engine.tokenizer)
        head, session = builder.head["id"], body.cogumi.session
        user, session = owner(http.scope, body.user), session and owner(http.scope, session)
        with_ids = [
            replace(one, id=answer_id(head, index), user=user, session=session) for index, one in enumerate(asked)
        ]
        requests = [host.engine.resolve(body.model, one)[1] for one in with_ids]
        call = Call(request_id(http.scope), body.model, bool(body.stream), on_answer)
        events = run_choices(call, engine, requests, host.threads, keep_alive_seconds)
        if (meter := meter_of(http.scope)) and meter.tokens:
            prompts = await host.work(prompt_sizes, engine, requests, body.n or 1)
            events = metered(events, meter, prompts, requests, engine.context or 0)
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
    """Embeddings and the tokenizer, which generate no text."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """One vector per text: the mean hidden state of its tokens."""
        found = await unless_disconnected(request, embedded(host, body, meter_of(request.scope)))
        return CLIENT_CLOSED_REQUEST if found is None else JSONResponse(found)

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, str | None]:
        """The special tokens and the chat template."""
        return dict(host.tokenizer(model).settings)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"tokens": await host.work(body.ids, host.tokenizer(body.model))}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Text of ids, special tokens left out."""
        return {"prompt": await host.work(host.tokenizer(body.model).decode, body.tokens)}

    return router


def feedback_routes(host: EngineHost) -> APIRouter:
    """Ratings of answers by their users."""
    router = APIRouter()

    @router.post("/v1/feedback", status_code=204, response_class=Response)
    async def feedback(body: Feedback, request: Request) -> None:
        """Rate an answer as right or wrong; its id is that of the completion, with `-1` etc. for further choices."""
        rate = host.engine.feedback
        try:
            await host.work(rate, body.id, body.right, owner(request.scope, body.user))
        except RequestError as error:
            raise Problem(404, str(error), code="answer_not_found", param="id") from error

    return router


def personal_routes(host: EngineHost) -> APIRouter:
    """Personal routing of users; off by default."""
    router = APIRouter()

    async def chosen(request: Request, user: str, on: bool | None) -> dict[str, Any]:
        choose = host.engine.personal
        return asdict(await host.work(choose, owner(request.scope, user), on))

    @router.get("/v1/personal")
    async def shown(user: str, request: Request) -> dict[str, Any]:
        """Show whether it is on, the number of rated answers and of those needed, and the offsets by domain."""
        return await chosen(request, user, None)

    @router.post("/v1/personal")
    async def switched(body: PersonalChoice, request: Request) -> dict[str, Any]:
        """Switch it on or off; the response is that of GET."""
        return await chosen(request, body.user, body.on)

    return router


def modifier_routes(host: EngineHost, folder: Path | None) -> APIRouter:
    """Adding modifiers from the operator's `folder` to the running server; refused without a folder."""
    router = APIRouter()

    @router.post("/v1/modifiers", status_code=201)
    async def added(body: NewModifier) -> dict[str, Any]:
        """Add a modifier; it becomes one of the models."""
        if folder is None:
            what = "modifiers cannot be added to this server: start it with --modifiers FOLDER"
            raise Problem(403, what, code="modifiers_off")
        add, path = host.engine.add_modifier, _inside(folder, body.file)
        try:
            await host.work(add, body.name, path)
        except CogumiError as error:
            raise Problem(400, str(error), code="invalid_modifier") from error
        return host.model_object(f"cogumi:base+{body.name}")

    return router


def _inside(folder: Path, file: str) -> Path:
    """The path of a file in the folder; raises `Problem` for a name with folders or a link out of the folder."""
    root, found, exists = folder.resolve(), None, False
    with suppress(OSError, RuntimeError, ValueError):  # name too long, cyclic links, a null byte
        found = (folder / file).resolve()
        exists = found.is_file()
    if found is None or file != Path(file).name or not found.is_relative_to(root):
        raise Problem(400, f"{file!r} is not the name of a file in the folder of modifiers", param="file")
    if not exists:
        raise Problem(404, f"there is no file {file!r} in the folder of modifiers", param="file")
    return found


async def _first(lines: AsyncGenerator[str]) -> str:
    return await anext(lines)


def _headers(reply: Reply) -> dict[str, str]:
    """The tier, route and P(correct) of an answer, for clients that read only headers."""
    headers = {
        "x-cogumi-tier": quote(reply.tier, safe=" +:>,/-"),
        "x-cogumi-route": quote(reply.route, safe=" +:>,/-"),
    }
    return headers | ({} if reply.p_correct is None else {"x-cogumi-p-correct": f"{reply.p_correct:.4f}"})
