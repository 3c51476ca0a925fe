"""Quality loss of a quantized key-value cache, as the perplexity of a text (SPEC D8)."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

from cogumi.core.errors import DataError
from cogumi.core.types import Request
from cogumi.engine.llama.engine import LlamaEngine


def perplexity(model: Path, text: str, cache: str, context: int) -> float:
    """exp(nats per token) of `text`, read in chunks of up to `context` tokens through a cache of type `cache`.

    A chunk starts with the last token of the previous one, so that every token except the first counts once. Raises
    `DataError` for a text of fewer than two tokens.
    """
    with closing(LlamaEngine(model, slots=1, context=context, lookup=False, cache=cache)) as engine:
        ids = engine.tokenizer.encode(text)
        if len(ids) < 2:
            raise DataError("perplexity needs a text of at least two tokens; give a longer one")
        chunks = [tuple(ids[start : start + context]) for start in range(0, len(ids) - 1, context - 1)]
        return math.exp(sum(engine.read(Request(prompt=chunk)).score.nats for chunk in chunks) / (len(ids) - 1))
