"""Converts the events of an answer to server-sent events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from cogumi.core.types import Reply, Token, Usage
from cogumi.engine.protocol import Event
from cogumi.engine.stream_text import text_delta
from cogumi.serve.choices import ChoiceEvents
from cogumi.serve.problem import Problem
from cogumi.serve.request_body import ResponseBuilder

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def server_sent(events: ChoiceEvents, builder: ResponseBuilder) -> AsyncGenerator[str]:
    """The lines of a stream, ending with `[DONE]`.

    A `Problem` before the first line is raised, so that it becomes an HTTP status; a later one is sent as data.
    """
    sent: dict[int, str] = {}
    usages: dict[int, Usage] = {}
    begun = False
    try:
        async with contextlib.aclosing(events):
            async for item in events:
                lines = [KEEP_ALIVE] if item is None else [_data(c) for c in _chunks(*item, sent, builder)]
                if item is not None and isinstance(item[1], Reply):
                    usages[item[0]] = item[1].usage
                for line in lines:
                    begun = True
                    yield line
    except Problem as problem:
        if not begun:
            raise
        yield _data(problem.body)
    else:
        if builder.include_usage:
            yield _data(builder.usage_chunk([usages[index] for index in sorted(usages)]))
    yield DONE


def _chunks(index: int, event: Event, sent: dict[int, str], builder: ResponseBuilder) -> list[dict[str, Any]]:
    """The chunks of one event of choice `index`; `sent` holds the text of each choice so far."""
    text, whole = text_delta(sent.get(index, ""), event)
    first, reply = index not in sent, event if isinstance(event, Reply) else None
    tokens: tuple[Token, ...] = (event,) if isinstance(event, Token) else ()
    if reply and first:  # nothing was streamed: send all tokens now
        tokens = reply.tokens
    if not (text or reply or (tokens and builder.wants_tokens)):
        return []
    sent[index] = whole
    return builder.chunks(index, text, tokens, first=first, reply=reply)
