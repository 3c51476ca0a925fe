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
from cogumi.serve.request_body import Body, Unsettable, best_logprobs, extensions, new_head, usage_object
from cogumi.serve.tool_requests import MOST_TOOLS, Offer, Tool, ToolCall, ToolChoice, begins_call, written


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

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _needs_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} needs a content")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of a tool needs the tool_call_id of the call that it answers")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant's message has tool_calls, not one of the {self.role}")
        return self

    def plain(self, called: Mapping[str, str]) -> Message:
        """Convert to the engine's message; `called` has the name of the function of each earlier call.

        `developer` becomes `system`, disclaimers of earlier answers are removed, calls and results become text.
        """
        content = self.content or ""
        if self.role == "assistant":
            calls = [written(self.tool_calls)] if self.tool_calls else []
            return Message(self.role, "\n".join([*filter(None, [without_disclaimer(content)]), *calls]))
        if self.role == "tool":
            return Message("user", f"{called[self.tool_call_id or '']} returned: {content}")
        return Message("system" if self.role == "developer" else self.role, content)


class JsonSchema(BaseModel):
    """The schema of the answer. It is always enforced, for any value of `strict`."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Free text, any JSON object, or JSON of one schema; llama.cpp's clients give it as `schema` of a `json_object`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _needs_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        if self.type != "json_object" and self.schema_ is not None:
            raise ValueError(
                "schema belongs to type json_object; with type json_schema give json_schema: {name, schema}"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON text, None for free text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return json.dumps(self.schema_ or {"type": "object"}) if self.type == "json_object" else None


class ChatRequest(Body):
    """Body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **Body.unsupported,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "continue_final_message": (False,),
        "add_generation_prompt": (True,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Annotated[int, Field(ge=1)] | None, Unsettable] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> ChatRequest:
        if self.guided_json is not None and self.response_format is not None:
            raise ValueError("guided_json and response_format exclude each other; give one of them")
        if self.offer and self.schema_text is not None:
            raise ValueError("tools and a schema of the answer exclude each other; leave out response_format, or tools")
        return self

    @model_validator(mode="after")
    def _answered_calls(self) -> ChatRequest:
        called = self._called
        for message in self.messages:
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(f"tool_call_id {message.tool_call_id!r} is not that of a call in the messages")
        if self.offer and all(message.role != "user" for message in self.messages):
            raise ValueError("tools need a message of the user that asks for something")
        return self

    @model_validator(mode="after")
    def _needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema of the answer as JSON text, None for free text."""
        return self.response_format.schema_text if self.response_format else self.guided_schema

    @property
    def offer(self) -> Offer | None:
        """The functions that the answer may call."""
        return Offer.of(self.tools or (), self.tool_choice or "auto", self.parallel_tool_calls)

    @property
    def _called(self) -> dict[str, str]:
        """The name of the function of each call in the messages."""
        return {call.id: call.function.name for message in self.messages for call in message.tool_calls or ()}

    def _plain(self, offer: Offer | None) -> tuple[Message, ...]:
        """The engine's messages: the last one of the user offers the tools, results that follow each other are one."""
        called, found, asked = self._called, list[Message](), -1
        for i, message in enumerate(self.messages):
            plain = message.plain(called)
            if i and message.role == self.messages[i - 1].role == "tool":
                plain = Message("user", f"{found.pop().content}\n{plain.content}")
            found.append(plain)
            asked = len(found) - 1 if message.role == "user" else asked
        if offer:
            found[asked] = Message("user", offer.asked(found[asked].content))
        return tuple(found)

    def requests(self) -> list[Request]:
        """One engine request per choice."""
        offer = self.offer
        return self.choices(
            messages=self._plain(offer),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=self.top_logprobs,
            json_schema=offer.schema if offer else self.schema_text,
            free_text=bool(offer and not offer.required),
        )


class ChatResponseBuilder:
    """`ResponseBuilder` of chat completions."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.include_usage, self.wants_tokens = body.include_usage, bool(body.logprobs)
        self.head, self._n = new_head("chatcmpl", body.model), body.n or 1
        self._formatted = body.schema_text is not None
        self._ignored, self._offer = body.ignored, body.offer
        self._held: dict[int, str] = {}  # text of each streamed choice that may be a call

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
        choices = []
        for index, reply in enumerate(replies):
            calls = self._calls(reply)
            said = {"tool_calls": calls} if calls else self._text(reply.text)
            choice = {
                "index": index,
                "message": {"role": "assistant", "content": None, "refusal": None} | said,
                "logprobs": self.logprobs(reply.tokens),
                "finish_reason": "tool_calls" if calls else reply.finish_reason,
            }
            choices.append(choice)
        usage = usage_object([reply.usage for reply in replies], self._n)
        own = {"object": "chat.completion", "choices": choices, "usage": usage}
        return self.head | own | {"cogumi": extensions(replies) | self._ignored}

    def chunks(
        self, index: int, text: str, tokens: Sequence[Token], *, first: bool, reply: Reply | None
    ) -> list[dict[str, Any]]:
        """The role first, then text and tokens, then the end with the key `cogumi`.

        A text that begins as a call is held back until it is complete, and sent as calls.
        """
        chunks = [self._chunk(index, {"role": "assistant", "content": ""})] if first else []
        calls = self._calls(reply) if reply else []
        if self._offer:
            text = self._held.pop(index, "") + text
            if not reply and (not text.strip() or begins_call(text)):
                self._held[index], text = text, ""
        for at, call in enumerate(calls):
            function = call["function"]
            begun = call | {"index": at, "function": {"name": function["name"], "arguments": ""}}
            chunks.append(self._chunk(index, {"tool_calls": [begun]}))
            rest = {"index": at, "function": {"arguments": function["arguments"]}}
            chunks.append(self._chunk(index, {"tool_calls": [rest]}))
        text = "" if calls else text
        if text or (tokens and self.wants_tokens):
            chunks.append(self._chunk(index, self._text(text), self.logprobs(tokens) if tokens else None))
        if reply:
            chunks.append(
                self._chunk(index, {}, None, "tool_calls" if calls else reply.finish_reason)
                | {"cogumi": extension(reply) | self._ignored}
            )
        return chunks

    def _calls(self, reply: Reply) -> list[dict[str, Any]]:
        """The calls of a complete answer."""
        return self._offer.calls(reply.text) if self._offer and reply.finish_reason == "stop" else []

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices."""
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": usage_object(usages, self._n)}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self.head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self.include_usage else {})
