"""OpenAI's embeddings: validates the body, converts vectors to the response."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from cogumi.engine.protocol import Tokenizer
from cogumi.serve.completions import Texts


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
