"""Validation of requests before any work: adapter, prompt and context length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from cogumi.core.errors import ContextError, RequestError
from cogumi.core.text import common_prefix
from cogumi.core.types import Request
from cogumi.engine.few_shot import in_context
from cogumi.engine.protocol import Tokenizer
from cogumi.engine.sampling import check


def admit(request: Request, tokenizer: Tokenizer, adapters: Collection[str], context: int) -> tuple[Request, list[int]]:
    """Validate a request for an engine with a context of `context` tokens.

    Returns the request, with a number as `max_tokens`, and its prompt ids.

    Raises `ContextError` if it is too long, `RequestError` for other invalid requests.
    """
    check(request)
    prompt = prompt_ids(request, tokenizer, adapters)
    most = request.max_tokens
    if len(prompt) + (1 if most is None else most) > context:
        asked = "" if most is None else f" and max_tokens is {most}"
        raise ContextError(
            f"the prompt has {len(prompt)} tokens{asked}, but the context holds {context}; shorten the prompt"
            + ("" if most is None else " or ask for fewer tokens")
        )
    if beyond := [token for token in request.logit_bias if token >= tokenizer.size]:
        raise RequestError(f"logit_bias names token {beyond[0]}; the vocabulary ends at {tokenizer.size - 1}")
    return replace(request, max_tokens=context - len(prompt) if most is None else most), prompt


def prompt_ids(request: Request, tokenizer: Tokenizer, adapters: Collection[str]) -> list[int]:
    """Prompt ids of a request, with its examples in context.

    `RequestError` for an unknown adapter, an empty prompt, invalid ids, or a request to adapt the head.
    """
    check_adapter(request, adapters)
    prompt = tokenizer.render(in_context(request))
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if not all(0 <= token < tokenizer.size for token in prompt):
        raise RequestError(f"the prompt contains an id outside the vocabulary of {tokenizer.size}")
    return prompt


def question_start(request: Request, prompt: Sequence[int], tokenizer: Tokenizer) -> int:
    """The number of leading prompt ids that do not depend on the last message: system prompt and earlier turns.

    At least 1; for a raw prompt, 1.
    """
    if request.prompt is not None or not request.messages:
        return 1
    *before, last = in_context(request).messages
    without = Request(messages=(*before, replace(last, content="")), tools=request.tools)
    return max(1, common_prefix(prompt[:-1], tokenizer.render(without)))


def continuation(request: Request, answer: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of `answer` after a request's prompt: with the end token for a chat, without it for a raw prompt."""
    return [*tokenizer.encode(answer), *([] if request.prompt is not None else [tokenizer.eos])]


def check_adapter(request: Request, adapters: Collection[str]) -> None:
    """Raise `RequestError` if the request names an unknown adapter."""
    if request.adapter is not None and request.adapter not in adapters:
        raise RequestError(f"unknown adapter {request.adapter!r}; known: {', '.join(adapters) or 'none'}")


def check_length(tokens: int, context: int) -> None:
    """Raise `ContextError` if a text of `tokens` tokens does not fit the context."""
    if tokens > context:
        raise ContextError(f"the text has {tokens} tokens, but the context holds {context}; shorten it")
