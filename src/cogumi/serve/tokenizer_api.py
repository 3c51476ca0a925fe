"""The tokenizer over HTTP, with the interface that lm-evaluation-harness uses."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from cogumi.core.types import Request
from cogumi.engine.protocol import Tokenizer


def text_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
    """The ids of a raw prompt: bos first if `add_special_tokens` and the model wants one; names of special tokens are
    these tokens if `parse_special`, else ordinary text.
    """
    ids = tokenizer.encode(text, special=parse_special)
    begin = tokenizer.render(Request(prompt="")) if add_special_tokens else []
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`: the text is read as `/v1/completions` reads a prompt."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    parse_special: bool = True

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the prompt."""
        return text_ids(tokenizer, self.prompt, self.add_special_tokens, self.parse_special)


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0)]]
    model: str | None = None
