"""Shared text functions: normalisation, code fences, numbers, the last user message."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from cogumi.core.types import Message

NUMBER = r"(?:(?<![\w.)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}\b)?"
"""A decimal number as a regular expression without groups: sign, thousands separated by commas, exponent."""
FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
"""A Markdown code fence, closed or truncated; group 1 is its content."""


def normalise(text: str) -> str:
    """Text with case folded, Unicode NFKC, white space collapsed, outer quotes and the final full stop removed."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    return re.sub(r"\s+", " ", text).strip(" \"'`").rstrip(".!").strip(" \"'`")


def strip_fences(text: str) -> str:
    """The content of the first code fence, or the whole text without one."""
    found = FENCE.search(text)
    return found.group(1) if found else text


def last_user_message(messages: Iterable[Message]) -> str:
    """The content of the last message with the role `user`; empty without one."""
    return next((m.content for m in reversed(tuple(messages)) if m.role == "user"), "")
