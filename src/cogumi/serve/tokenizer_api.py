"""The tokenizer over HTTP, with the interface that lm-evaluation-harness uses."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from cogumi.engine.protocol import Tokenizer


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`. The text of special tokens is recognised.

    `add_special_tokens` is ignored, because completions add no special tokens to a prompt either.
    """

    prompt: str
    model: str | None = None

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the prompt."""
        return tokenizer.encode(self.prompt, special=True)


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0)]]
    model: str | None = None
