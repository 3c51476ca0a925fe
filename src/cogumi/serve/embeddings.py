"""OpenAI's embeddings: validates the body, embeds the texts in parts, converts vectors to the response."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from cogumi.engine.protocol import Tokenizer
from cogumi.serve.completions import Texts
from cogumi.serve.engine_host import EngineHost
from cogumi.serve.rate_limits import Meter

TOKENS = 512
"""Tokens of the texts that are embedded in one go; between two goes other requests take their turn."""


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Ids are decoded to text."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @model_validator(mode="after")
    def _refuse_dimensions(self) -> EmbeddingRequest:
        if self.dimensions is not None:
            raise ValueError("dimensions is not supported: a vector has the model's width; leave it out")
        return self

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The texts to embed, in order."""
        return [one if isinstance(one, str) else tokenizer.decode(one) for one in self.input]

    def answer(self, rows: NDArray[np.float32], tokens: int) -> dict[str, Any]:
        """The response for the vectors `rows` [texts, width]; `tokens`: total number of tokens."""
        if self.encoding_format == "base64":
            vectors: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in rows]
        else:
            vectors = rows.tolist()
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": self.model, "data": data, "usage": usage}


async def embedded(host: EngineHost, body: EmbeddingRequest, meter: Meter | None) -> dict[str, Any]:
    """The response of a request; a cancellation takes effect before the next part. `Problem` beyond the key's limit."""
    engine = host.resolved(body.model)
    texts = await host.work(body.texts, engine.tokenizer)
    sizes = await host.work(_sizes, engine.tokenizer, texts)
    if meter:
        meter.take_tokens(sum(sizes))
    rows = [await host.work(engine.embed, texts[first:last]) for first, last in parts(sizes)]
    return body.answer(np.concatenate(rows), sum(sizes))


def _sizes(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    return [len(tokenizer.encode(text)) for text in texts]


def parts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Divide texts of `sizes` tokens into runs `first:last` of at most `TOKENS` tokens, or of one text."""
    first, tokens = 0, 0
    for i, size in enumerate(sizes):
        if i > first and tokens + size > TOKENS:
            yield first, i
            first, tokens = i, 0
        tokens += size
    yield first, len(sizes)
