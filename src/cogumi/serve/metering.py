"""Tokens of a call under a key's limit: the most it may take is reserved before any work, the rest is given back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from cogumi.core.types import Reply, Request, Token
from cogumi.engine.few_shot import in_context
from cogumi.engine.protocol import Engine
from cogumi.serve.choices import ChoiceEvents
from cogumi.serve.rate_limits import Meter


def prompt_sizes(engine: Engine, requests: Sequence[Request], n: int) -> list[int]:
    """Tokens of the prompt of every request; of `n` choices of one prompt the first has them."""
    return [0 if i % n else len(engine.tokenizer.render(in_context(one))) for i, one in enumerate(requests)]


async def metered(
    events: ChoiceEvents, meter: Meter, prompts: Sequence[int], requests: Sequence[Request], context: int
) -> ChoiceEvents:
    """The same events; `context` is 0 where only a remote server knows it.

    Raises `Problem` 429 before the first one if the key has too few tokens left.
    """
    size = max(prompts)
    most = [max(0, context - size) if one.max_tokens is None else one.max_tokens for one in requests]
    reserved = sum(prompts) + sum(most)
    meter.take_tokens(reserved)
    generated = [0] * len(requests)
    began = False
    try:
        async with contextlib.aclosing(events):
            async for item in events:
                began = True
                if item and isinstance(item[1], Token):
                    generated[item[0]] += 1
                elif item and isinstance(item[1], Reply):
                    generated[item[0]] = item[1].usage.completion_tokens
                yield item
    finally:
        meter.give_back(tokens=reserved - (sum(prompts) + sum(generated) if began else 0))
