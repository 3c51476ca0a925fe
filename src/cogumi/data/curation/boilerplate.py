"""Rule: the text is not boilerplate: remains of web pages, stock phrases of chat models, repeated lines (SPEC A5)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.types import Example
from cogumi.data.curation.pool_writer import whole_text

REMEDY = "raise `phrases` or `repeated_lines` of `boilerplate`"

_PHRASES = re.compile(
    r"\bas an? (?:large )?(?:ai|artificial intelligence)(?: language)? (?:model|assistant)\b"
    r"|\bmy (?:knowledge cutoff|training data)\b"
    r"|\bi(?: am|'m) (?:just )?an ai\b"
    r"|\blorem ipsum\b"
    r"|\bclick (?:here|the link below)\b"
    r"|\b(?:sign up for|subscribe to) (?:our|the) newsletter\b"
    r"|\b(?:cookie|privacy) policy\b"
    r"|\bterms (?:of use|of service|and conditions apply)\b"
    r"|\benable javascript\b|\bjavascript is (?:disabled|required)\b"
    r"|\bshare (?:this )?on (?:facebook|twitter|linkedin)\b"
    r"|\bskip to (?:main )?content\b",
    re.IGNORECASE,
)
_MIN_LINES, _MIN_WORDS = 5, 4
"""Lines from which repetition is counted, and words of a line that counts: closing brackets repeat in any program."""


class Settings(BaseModel):
    """A row with more than `phrases` stock phrases, or a larger share of `repeated_lines` (0 to 1), is dropped."""

    model_config = ConfigDict(extra="forbid")
    phrases: int = Field(0, ge=0)
    repeated_lines: float = Field(0.3, ge=0, le=1)


def measure(example: Example) -> dict[str, Any]:
    """{"phrases": those found, "repeated_lines": share of the lines, except short ones, that repeat an earlier one}.

    Lines are compared within the question and within the answer: a corrected program repeats the one in the question.
    """
    question = "\n".join(message.content for message in example.messages if message.role != "system")
    repeated = max(_repeated(question), _repeated(example.answer))
    return {"phrases": [found.group() for found in _PHRASES.finditer(whole_text(example))], "repeated_lines": repeated}


def _repeated(text: str) -> float:
    lines = [line.strip() for line in text.split("\n") if len(line.split()) >= _MIN_WORDS]
    return round(1 - len(set(lines)) / len(lines), 4) if len(lines) >= _MIN_LINES else 0.0


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from a row's value to the reason why it is dropped, or None."""

    def reason(value: Any) -> str | None:
        if len(value["phrases"]) > settings.phrases:
            return f"says '{value['phrases'][0]}'"
        if value["repeated_lines"] > settings.repeated_lines:
            return f"{value['repeated_lines']:.0%} of the lines repeat another"
        return None

    return reason
