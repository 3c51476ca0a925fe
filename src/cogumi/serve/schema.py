"""The wire format of OpenAI's chat API: bodies checked and turned into `Request`, replies into JSON objects.

Keys that change nothing here (`metadata`, unknown ones) are accepted; what a client asks for and this version
cannot do (tools, JSON schemas, penalties) is refused by name, never silently dropped.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cogumi import __version__
from cogumi.cascade.cascade import without_note
from cogumi.errors import BusyError, ContextError, RequestError
from cogumi.runtime.engine import Tokenizer
from cogumi.types import Message, Reply, Request, Token, Usage


class Problem(Exception):
    """A refusal as the client sees it: HTTP `status` and the body's message, type, code and param."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body every OpenAI client understands."""
        kind = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client whether asking again can help."""
        if not self.retry:
            return {"x-should-retry": "false"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}


def problem_of(error: RequestError) -> Problem:
    """The refusal that stands for an engine's error."""
    if isinstance(error, ContextError):
        return Problem(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, BusyError):
        return Problem(429, str(error), code="busy", retry=True)
    return Problem(400, str(error))


def internal_error() -> Problem:
    """The refusal that stands for a defect of ours; its traceback goes to the log only."""
    return Problem(500, "internal error; the server's log has the details", code="internal_error", retry=True)


def _joined(content: Any) -> Any:
    """The text of a list of text parts; anything that is not text is refused."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise ValueError('this version supports only parts of the form {"type": "text", "text": "..."}')
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One message: a text, or text parts (joined by newlines). Keys such as `name` change nothing."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]

    def plain(self) -> Message:
        """The message as engines take it: `developer` is today's name for `system`, our own notes are left out."""
        if self.role == "assistant":
            return Message(self.role, without_note(self.content))
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(BaseModel):
    """Only `include_usage` means something here."""

    include_usage: bool = False


class CogumiOptions(BaseModel):
    """Our own options, under the request's key `cogumi`."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = None
    modifier: str | None = None
    speculate: bool | None = None
    abstain: bool = False
    session: str | None = None


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


_NO_OP: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
}
"""What this version cannot do: each key with the values (besides null) that ask for nothing."""


class ChatRequest(BaseModel):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_listed)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    cogumi: CogumiOptions = CogumiOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object (send it with content-type: application/json)")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half of a surrogate pair; send whole characters") from error
        for key, harmless in _NO_OP.items():
            value = body.get(key)
            if value is not None and value not in harmless:
                raise ValueError(f"{key} is not supported by this version of cogumi; leave it out")
        messages = body.get("messages")
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, dict) and (message.get("tool_calls") or message.get("role") in ("tool", "function")):
                raise ValueError("tool calls in messages are not supported by this version of cogumi")
        return body

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def requests(self) -> list[Request]:
        """One engine request per choice; with a `seed`, choice i draws from `seed + i`.

        What the body leaves open keeps the default of `Request`.
        """
        asked: dict[str, Any] = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        return [
            Request(
                messages=tuple(message.plain() for message in self.messages),
                stop=tuple(self.stop or ()),
                seed=None if self.seed is None else self.seed + index,
                logprobs=self.top_logprobs or 0,
                adapter=self.cogumi.modifier,
                speculate=self.cogumi.speculate,
                mode=self.cogumi.mode,
                abstain=self.cogumi.abstain,
                user=self.user,
                session=self.cogumi.session,
                **{key: value for key, value in asked.items() if value is not None},
            )
            for index in range(self.n or 1)
        ]


def model_object(name: str, created: int) -> dict[str, Any]:
    """One entry of the model list; `created` in Unix seconds."""
    return {"id": name, "object": "model", "created": created, "owned_by": "cogumi"}


def extension(reply: Reply) -> dict[str, Any]:
    """The `cogumi` object: who answered, how sure it is, and why. `tier` is empty where one tier was asked directly."""
    return {
        "tier": reply.tier,
        "route": reply.route,
        "p_correct": reply.p_correct,
        "decisions": [asdict(decision) for decision in reply.decisions],
        "signals": dict(reply.signals),
        "usage": asdict(reply.usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class Shape:
    """Builds the JSON objects of one completion; every chunk of it carries the same id, time and model."""

    body: ChatRequest
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": f"cogumi-{__version__}",
        }

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """`logprobs.content` of generated tokens (the end token left out), None unless asked for."""
        if not self.body.logprobs:
            return None

        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(token.text, token.logprob)
            | {"top_logprobs": [entry(self.tokenizer.decode([id_]), logprob) for id_, logprob in token.top]}
            for token in tokens
            if token.id != self.tokenizer.eos
        ]
        return {"content": content, "refusal": None}

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole answer. With several choices `cogumi` is of the first, `cogumi.choices` holds all."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": self.logprobs(reply.tokens),
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(replies)
        ]
        ours = extension(replies[0])
        if len(replies) > 1:
            ours["choices"] = [extension(reply) for reply in replies]
        usage = sum((reply.usage for reply in replies), Usage())
        return self._head("chat.completion") | {"choices": choices, "usage": _usage(usage), "cogumi": ours}

    def chunk(
        self,
        index: int,
        delta: Mapping[str, str],
        *,
        tokens: Sequence[Token] = (),
        reply: Reply | None = None,
    ) -> dict[str, Any]:
        """A piece of a stream; with `reply` the last piece of its choice, which carries `cogumi`."""
        choice = {
            "index": index,
            "delta": dict(delta),
            "logprobs": self.logprobs(tokens) if tokens else None,
            "finish_reason": reply.finish_reason if reply else None,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self.body.include_usage:
            chunk["usage"] = None
        if reply:
            chunk["cogumi"] = extension(reply)
        return chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk without choices that ends a stream asked to `include_usage`."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": _usage(usage)}
