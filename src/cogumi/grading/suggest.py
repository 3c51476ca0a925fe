"""Chooses the grader of rows that bring none, by their answers (SPEC M4, B3)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cogumi.core.text import NUMBER

SUGGESTED = ("exact", "short_answer", "numeric", "choice", "tool_call")
"""Kinds of checks that an answer alone defines."""
MOST = 0.95
"""Share of the answers that must have a grader's form."""
CLASSES, PER_CLASS = 12, 8
"""At most so many different answers, each this often on average, are the options of a choice."""
WORDS = 8
"""An answer of more words is free text, which no grader can judge."""

_ALONE = re.compile(rf"\W*{NUMBER}\s*\W?[\w%°]*\W*")
_FINAL = re.compile(rf"####\s*{NUMBER}\s*$")
_LETTER = re.compile(r"\(?[A-J]\)?\.?")


def suggested_grader(answers: Sequence[str]) -> str | None:
    """The kind of check that fits: `tool_call`, `numeric`, `choice` or `short_answer`; None for free text.

    A number that ends an explained answer after `####` counts as a number.
    """

    def most(fits: Sequence[bool]) -> bool:
        return sum(fits) >= MOST * len(answers)

    texts = [answer.strip() for answer in answers]
    if not texts:
        return None
    if most([_is_tool_call(text) for text in texts]):
        return "tool_call"
    if most([bool(_ALONE.fullmatch(text) or _FINAL.search(text)) for text in texts]):
        return "numeric"
    classes = {text.casefold() for text in texts}
    if most([bool(_LETTER.fullmatch(text)) for text in texts]):
        return "choice"
    if 2 <= len(classes) <= CLASSES and len(texts) >= PER_CLASS * len(classes):
        return "choice"
    return "short_answer" if most([len(text.split()) <= WORDS for text in texts]) else None


def check_of(kind: str, answer: str, answers: Collection[str]) -> Mapping[str, Any]:
    """The check of one row; `answers` are the different answers of its domain, the options of a choice."""
    if kind == "choice" and not all(_LETTER.fullmatch(text.strip()) for text in answers):
        return {"kind": kind, "options": sorted(answers)}
    return {"kind": kind, "answers": [answer]} if kind == "short_answer" else {"kind": kind}


def _is_tool_call(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    calls = found if isinstance(found, list) else [found]
    return bool(calls) and all(isinstance(call, dict) and "tool" in call for call in calls)
