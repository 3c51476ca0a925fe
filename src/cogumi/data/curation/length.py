"""Rule: question and answer together have a sensible length, in words or in tokens of the reference model (SPEC A5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cogumi.core.types import Example
from cogumi.data.curation.pool_writer import whole_text

REMEDY = "lower `min` or raise `max` of `length`"


class Settings(BaseModel):
    """Rows of `min` to `max` units are kept; tokens are counted if step `score` has a `reference`."""

    model_config = ConfigDict(extra="forbid")
    min: int = Field(150, ge=0)
    max: int = Field(2048, ge=1)
    unit: Literal["tokens", "words"] = "tokens"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


def measure(example: Example) -> dict[str, int]:
    """{"words": n}; step `score` adds {"tokens": n} if it has a model."""
    return {"words": len(whole_text(example).split())}


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from a row's value to the reason why it is dropped, or None."""

    def reason(value: Any) -> str | None:
        count = value[settings.unit]
        if settings.min <= count <= settings.max:
            return None
        bound = f"fewer than {settings.min:,}" if count < settings.min else f"more than {settings.max:,}"
        return f"{count:,} {settings.unit}, {bound}"

    return reason
