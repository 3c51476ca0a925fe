"""OpenAI's chat completions: validates the body, converts it to `Request`s, and replies to JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from cogumi.cascade.disclaimers import without_disclaimer
from cogumi.core.types import ABSTENTION, Message, Reply, Request, Token, Usage
from cogumi.engine.protocol import Tokenizer
from cogumi.engine.reply_extension import extension
from cogumi.serve.request_body import Body, best_logprobs, extensions, new_head, usage_object


def _joined(content: Any) -> Any:
    """Join a list of text parts; other kinds of parts are refused."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise ValueError('this version supports only parts of the form {"type": "text", "text": "..."}')
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One message: a text, or text parts (joined by newlines). Other keys, such as `name`, are ignored.

    The content of an assistant's message may be null, as in a refused answer.
    """

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_joined)]

    @model_validator(mode="after")
    def _needs_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} needs a content")
        return self

    def plain(self) -> Message:
        """Convert to the engine's message: `developer` becomes `system`, disclaimers of earlier answers are removed."""
        content = self.content or ""
        if self.role == "assistant":
            return Message(self.role, without_disclaimer(content))
        return Message("system" if self.role == "developer" else self.role, content)


class JsonSchema(BaseModel):
    """The schema of the answer. It is always enforced, for any value of `strict`."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON of one schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _needs_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON text, None for free text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return json.dumps({"type": "object"}) if self.type == "json_object" else None


class ChatRequest(Body):
    """Body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "functions": ([],),
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tool_calls(cls, body: Any) -> Any:
        messages = body.get("messages") if isinstance(body, dict) else None
        for message in messages if isinstance(messages, list) else []:
            if isinstance(message, dict) and (message.get("tool_calls") or message.get("role") in ("tool", "function")):
                raise ValueError("tool calls in messages are not supported by this version of cogumi")
        return body

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def requests(self) -> list[Request]:
        """One engine request per choice."""
        return self.choices(
            messages=tuple(message.plain() for message in self.messages),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=self.top_logprobs,
            json_schema=self.response_format.schema_text if self.response_format else None,
        )


class ChatResponseBuilder:
    """`ResponseBuilder` of chat completions."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.include_usage, self.wants_tokens = body.include_usage, bool(body.logprobs)
        self.head, self._n = new_head("chatcmpl", body.model), body.n or 1
        self._formatted = body.response_format is not None and body.response_format.schema_text is not None

    def _text(self, text: str) -> dict[str, str]:
        """An answer's text under its key: a withheld answer is no JSON, hence a `refusal` where JSON was requested."""
        return {"refusal" if self._formatted and text == ABSTENTION else "content": text}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """`logprobs.content` of generated tokens (without the end token); None unless requested."""
        if not self.wants_tokens:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            piece = self.tokenizer.piece(token)
            return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

        content = []
        for token in tokens:
            if token.id != self.tokenizer.eos:
                logprob, top = best_logprobs(token)
                content.append(entry(token.id, logprob) | {"top_logprobs": [entry(*one) for one in top]})
        return {"content": content, "refusal": None}

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": None, "refusal": None} | self._text(reply.text),
                "logprobs": self.logprobs(reply.tokens),
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(replies)
        ]
        usage = usage_object([reply.usage for reply in replies], self._n)
        own = {"object": "chat.completion", "choices": choices, "usage": usage}
        return self.head | own | {"cogumi": extensions(replies)}

    def chunks(
        self, index: int, text: str, tokens: Sequence[Token], *, first: bool, reply: Reply | None
    ) -> list[dict[str, Any]]:
        """The role first, then text and tokens, then the end with the key `cogumi`."""
        chunks = [self._chunk(index, {"role": "assistant", "content": ""})] if first else []
        if text or (tokens and self.wants_tokens):
            chunks.append(self._chunk(index, self._text(text), self.logprobs(tokens) if tokens else None))
        if reply:
            chunks.append(self._chunk(index, {}, None, reply.finish_reason) | {"cogumi": extension(reply)})
        return chunks

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices."""
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": usage_object(usages, self._n)}

    def _chunk(
        self, index: int, delta: Mapping[str, str], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self.head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self.include_usage else {})
