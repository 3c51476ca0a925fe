"""Rule: no offensive words (SPEC A5). Weak: a short list of English swear words finds neither hatred in polite words
nor other languages, and does not understand quotations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.types import Example
from cogumi.data.curation.pool_writer import whole_text

REMEDY = "leave `offensive` out: its word list is weak"

_LISTED = re.compile(
    r"\b(?:(?:mother)?fuck(?:er|ers|ing|ed|s)?|(?:bull)?shit(?:ty|s)?|bitch(?:es)?|bastards?|ass?holes?|arseholes?|cunts?"
    r"|dick(?:head|heads)|twats?|wank(?:er|ers)|sluts?|whores?|pricks|retards?|retarded)\b",
    re.IGNORECASE,
)


class Settings(BaseModel):
    """A row with more than `words` different offensive words is dropped."""

    model_config = ConfigDict(extra="forbid")
    words: int = Field(0, ge=0)


def measure(example: Example) -> list[str]:
    """The different offensive words of a row."""
    return sorted({found.group().casefold() for found in _LISTED.finditer(whole_text(example))})


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from a row's value to the reason why it is dropped, or None."""

    def reason(value: Any) -> str | None:
        return f"says '{value[0]}'" if len(value) > settings.words else None

    return reason
