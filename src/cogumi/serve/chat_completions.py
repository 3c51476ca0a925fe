"""OpenAI's chat completions: validates the body, converts it to `Request`s, and replies to JSON objects."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from cogumi.cascade.disclaimers import without_disclaimer
from cogumi.core.types import ABSTENTION, Message, Reply, Request, Token, Usage
from cogumi.engine.protocol import Tokenizer
from cogumi.engine.reply_extension import extension
from cogumi.serve.request_body import Body, Unsettable, best_logprobs, extensions, new_head, usage_object
from cogumi.serve.tool_formats import ToolFormat, earlier, format_of, result
from cogumi.serve.tool_requests import MOST_TOOLS, Offer, Tool, ToolCall, ToolChoice


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

    def plain(self, called: Mapping[str, str], template: str | None) -> Message:
        """Convert to the engine's message; `called` has the name of the function of each earlier call.

        `developer` becomes `system`, disclaimers of earlier answers are removed.
        """
        content = self.content or ""
        if self.role == "assistant":
            said = without_disclaimer(content)
            functions = [call.function for call in self.tool_calls or ()]
            return earlier(template, said, functions) if functions else Message(self.role, said)
        if self.role == "tool":
            return result(template, called[self.tool_call_id or ""], content)
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

    def tool_format(self, template: str | None) -> ToolFormat | None:
        """How a model with this chat template is offered the functions; None if there are none to call."""
        offer = self.offer
        return format_of(template, offer) if offer else None

    def _plain(self, tools: ToolFormat | None, template: str | None) -> tuple[Message, ...]:
        """The engine's messages: the last one of the user offers the tools, a user's messages in a row are one."""
        called, found, asked = self._called, list[Message](), -1
        for i, message in enumerate(self.messages):
            plain = message.plain(called, template)
            if i and message.role == self.messages[i - 1].role == "tool" and plain.role == "user":
                plain = Message("user", f"{found.pop().content}\n{plain.content}")
            found.append(plain)
            asked = len(found) - 1 if message.role == "user" else asked
        if tools:
            found[asked] = Message("user", tools.asked(found[asked].content))
        return tuple(found)

    def requests(self, tokenizer: Tokenizer) -> list[Request]:
        """One engine request per choice."""
        template = tokenizer.settings["chat_template"]
        tools = self.tool_format(template)
        return self.choices(
            messages=self._plain(tools, template),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=self.top_logprobs,
            json_schema=self.schema_text,
            lark=tools.lark() if tools else None,
            tools=tools.tools if tools else (),
        )


class ChatResponseBuilder:
    """`ResponseBuilder` of chat completions."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.include_usage, self.wants_tokens = body.include_usage, bool(body.logprobs)
        self.head, self._n = new_head("chatcmpl", body.model), body.n or 1
        self._formatted = body.schema_text is not None
        self._ignored, self._tools = body.ignored, body.tool_format(tokenizer.settings["chat_template"])
        self._said: dict[int, str] = {}  # text of each streamed choice that may call
        self._shown: dict[int, int] = {}  # characters of it that were sent

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
            words, calls = self._calls(reply)
            said = ({"content": words or None, "tool_calls": calls}) if calls else self._text(reply.text)
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

        What may be a call is held back until the answer is complete, and then sent as one.
        """
        chunks = [self._chunk(index, {"role": "assistant", "content": ""})] if first else []
        calls = self._calls(reply)[1] if reply else []
        if self._tools:
            said = self._said[index] = self._said.get(index, "") + text
            known, sent = len(said) if reply and not calls else self._tools.shown(said), self._shown.get(index, 0)
            text, self._shown[index] = said[sent:known], max(sent, known)
        if text or (tokens and self.wants_tokens):
            chunks.append(self._chunk(index, self._text(text), self.logprobs(tokens) if tokens else None))
        for at, call in enumerate(calls):
            function = call["function"]
            begun = call | {"index": at, "function": {"name": function["name"], "arguments": ""}}
            chunks.append(self._chunk(index, {"tool_calls": [begun]}))
            rest = {"index": at, "function": {"arguments": function["arguments"]}}
            chunks.append(self._chunk(index, {"tool_calls": [rest]}))
        if reply:
            chunks.append(
                self._chunk(index, {}, None, "tool_calls" if calls else reply.finish_reason)
                | {"cogumi": extension(reply) | self._ignored}
            )
        return chunks

    def _calls(self, reply: Reply) -> tuple[str, list[dict[str, Any]]]:
        """The words and the calls of a complete answer."""
        if self._tools is None or reply.finish_reason != "stop":
            return reply.text, []
        words, calls = self._tools.read(reply.text)
        return words, [
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call._asdict()} for call in calls
        ]

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices."""
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": usage_object(usages, self._n)}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self.head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self.include_usage else {})
