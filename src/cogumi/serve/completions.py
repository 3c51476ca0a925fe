"""OpenAI's legacy completions: raw prompts, used by lm-evaluation-harness to score log-likelihoods.

The tier of the model's name answers; for the cascade's name it is the base, because the draft reads only conversations,
not raw prompts.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from cogumi.core.types import Reply, Request, Token, Usage
from cogumi.engine.protocol import Tokenizer
from cogumi.engine.reply_extension import extension
from cogumi.serve.request_body import Body, Unsettable, best_logprobs, extensions, new_head, usage_object
from cogumi.serve.tokenizer_api import text_ids


def _several(value: Any) -> Any:
    """A list of prompts, each a text or ids, from any form that OpenAI's API accepts."""

    def is_ids(one: Any) -> bool:
        return isinstance(one, list) and bool(one) and all(type(i) is int and i >= 0 for i in one)

    if isinstance(value, str) or is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(one, str) for one in value) or all(map(is_ids, value))):
        return value
    raise ValueError("give a string, a list of strings, a list of token ids, or a list of such lists; none empty")


Texts = Annotated[list[str | list[int]], BeforeValidator(_several), Field(max_length=2048)]
"""One or several texts, each as a string or as ids."""
DEFAULT_TOKENS = 16
"""Default of `max_tokens`, as in OpenAI's API."""


class CompletionRequest(Body):
    """Body of `POST /v1/completions`. Each prompt has its own `n` choices.

    `max_tokens` 0 with `echo` returns only the prompt, usually for its log-probabilities. `add_special_tokens` and
    `parse_special` as for `/tokenize`.
    """

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**Body.unsupported, "suffix": ("",), "best_of": (1,)}

    prompt: Texts
    add_special_tokens: bool = True
    parse_special: bool = True
    max_tokens: Annotated[Annotated[int, Field(ge=0)] | None, Unsettable] = DEFAULT_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; set echo to get the prompt, or request at least 1 token")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("the log-probabilities of an echoed prompt cannot be streamed; leave out stream")
        return self

    def requests(self, tokenizer: Tokenizer) -> list[Request]:
        """One engine request per choice, all of the first prompt first."""
        echo = bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)
        own = {"logprobs": self.logprobs, "echo": echo, "json_schema": self.guided_schema}
        several = [self.choices(prompt=self._prompt(prompt, tokenizer), **own) for prompt in self.prompt]
        return [request for requests in several for request in requests]

    def _prompt(self, prompt: str | list[int], tokenizer: Tokenizer) -> str | tuple[int, ...]:
        if isinstance(prompt, str) and not (self.add_special_tokens and self.parse_special):
            return tuple(text_ids(tokenizer, prompt, self.add_special_tokens, self.parse_special))
        return prompt if isinstance(prompt, str) else tuple(prompt)


class CompletionResponseBuilder:
    """`ResponseBuilder` of legacy completions."""

    def __init__(self, body: CompletionRequest, requests: Sequence[Request], tokenizer: Tokenizer) -> None:
        self.body, self.requests, self.tokenizer = body, requests, tokenizer
        self.include_usage, self.wants_tokens = body.include_usage, body.logprobs is not None
        self.head = new_head("cmpl", body.model) | {"object": "text_completion"}
        self.lengths: dict[int, int] = {}  # characters of each streamed choice so far, its prompt's included

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "text": self.echoed(index) + reply.text,
                "logprobs": self._whole_logprobs(index, reply),
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(replies)
        ]
        usage = usage_object([reply.usage for reply in replies], self.body.n or 1)
        return self.head | {"choices": choices, "usage": usage, "cogumi": extensions(replies) | self.body.ignored}

    def chunks(
        self, index: int, text: str, tokens: Sequence[Token], *, first: bool, reply: Reply | None
    ) -> list[dict[str, Any]]:
        """Text (with the echoed prompt before the first) and tokens, then the end with the key `cogumi`."""
        chunks = []
        shown = (self.echoed(index) if first else "") + text
        if shown or (tokens and self.wants_tokens):
            offset = self.lengths.get(index, len(self.prompt_text(index)))
            chunks.append(self._chunk(index, shown, self._logprobs(tokens, offset)))
            self.lengths[index] = offset + len(text)
        if reply:
            chunks.append(
                self._chunk(index, "", None, reply.finish_reason) | {"cogumi": extension(reply) | self.body.ignored}
            )
        return chunks

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices."""
        return self.head | {"choices": [], "usage": usage_object(usages, self.body.n or 1)}

    def prompt_text(self, index: int) -> str:
        """The text of a choice's prompt."""
        prompt = self.requests[index].prompt
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt or ())

    def echoed(self, index: int) -> str:
        """The prompt's text if `echo` is set, else empty."""
        return self.prompt_text(index) if self.body.echo else ""

    def _chunk(self, index: int, text: str, logprobs: Any, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.head | {"choices": [choice]} | ({"usage": None} if self.include_usage else {})

    def _whole_logprobs(self, index: int, reply: Reply) -> dict[str, Any] | None:
        """Log-probabilities of the answer; with `echo` after those of the prompt, whose first token has none."""
        if not self.body.echo:
            return self._logprobs(reply.tokens, len(self.prompt_text(index)))
        first = self.tokenizer.render(self.requests[index])[0]
        unpredicted = Token(first, "", 0.0, 0.0, 0.0)
        listed = self._logprobs((unpredicted, *reply.prompt, *reply.tokens), 0)
        if listed is not None:
            listed["token_logprobs"][0] = listed["top_logprobs"][0] = None
        return listed

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """The legacy `logprobs` object, starting at character `offset`; None unless requested.

        One entry per token, including the end token. Of two best tokens with the same text, the better one is kept.
        """
        if not self.wants_tokens:
            return None
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts, logprobs, tops, offsets = [], [], [], []
        for token in tokens:
            piece = self.tokenizer.piece(token.id)
            logprob, best = best_logprobs(token)
            top: dict[str, float] = {}
            for other, value in (*best, (token.id, logprob)):
                top.setdefault(token_text(self.tokenizer.piece(other)), value)
            texts.append(token_text(piece))
            logprobs.append(logprob)
            tops.append(top)
            offsets.append(offset)
            offset += len(decoder.decode(piece))
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def token_text(piece: bytes) -> str:
    """A token in OpenAI's text form: the text, or `bytes:\\x..` for an incomplete character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
