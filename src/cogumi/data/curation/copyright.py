"""Rule: no copyright notice, and a licence among the allowed ones (SPEC A5).

Only explicit marks are found; a text without one may be protected too. Texts shared with protected works are found by
stage `decontaminate`, given these as `files`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.types import Example
from cogumi.data.curation.pool_writer import whole_text
from cogumi.data.examples import LICENCE

REMEDY = "raise `notices` of `copyright`, or name the licences of your sources under `licences`"
UNKNOWN = "unknown"
"""The licence of a row whose source names none."""

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
    """A row with more than `notices` marks is dropped, and one with a licence that is not among `licences`, in any
    letter case; None: not checked. `unknown` allows rows without a licence.
    """

    model_config = ConfigDict(extra="forbid")
    notices: int = Field(0, ge=0)
    licences: tuple[str, ...] | None = Field(None, min_length=1)


def measure(example: Example) -> dict[str, list[str]]:
    """The notices of a row, and the licences of its source, of which all apply."""
    notices = [found.group() for found in _NOTICES.finditer(whole_text(example))]
    return {"notices": notices, "licences": example.meta.get(LICENCE, [UNKNOWN])}


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from a row's value to the reason why it is dropped, or None."""
    allowed = {name.strip().casefold() for name in settings.licences or ()}

    def reason(value: Any) -> str | None:
        if len(value["notices"]) > settings.notices:
            return f"has the notice '{value['notices'][0]}'"
        others = [name for name in value["licences"] if name.casefold() not in allowed]
        if settings.licences is not None and others:
            return f"has the licence '{others[0]}'" if others != [UNKNOWN] else "its source names no licence"
        return None

    return reason
