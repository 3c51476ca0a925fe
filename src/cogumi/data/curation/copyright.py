"""Rule: no copyright notice (SPEC A5). Only explicit marks are found; a text without one may be protected too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.types import Example
from cogumi.data.curation.pool_writer import whole_text

REMEDY = "raise `notices` of `copyright`"

_NOTICES = re.compile(
    r"©\s?(?:\d{4}|[A-Z])"
    r"|\(c\)\s?(?:copyright\s)?\d{4}"
    r"|\bcopyright (?:©|\(c\)|\d{4})"
    r"|\ball rights reserved\b"
    r"|\bSPDX-License-Identifier:"
    r"|\b(?:no part of this (?:publication|book) may be|may not be) reproduced\b"
    r"|\breprinted (?:with|by) permission\b"
    r"|\bGNU (?:Lesser |Affero )?General Public License\b",
    re.IGNORECASE,
)


class Settings(BaseModel):
    """A row with more than `notices` marks is dropped."""

    model_config = ConfigDict(extra="forbid")
    notices: int = Field(0, ge=0)


def measure(example: Example) -> list[str]:
    """The notices of a row."""
    return [found.group() for found in _NOTICES.finditer(whole_text(example))]


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from a row's value to the reason why it is dropped, or None."""

    def reason(value: Any) -> str | None:
        return f"has the notice '{value[0]}'" if len(value) > settings.notices else None

    return reason
