"""Shared text functions: normalisation, code fences, numbers, abstentions, the last user message."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from cogumi.core.types import ABSTENTION, Message

NUMBER = r"(?:(?<![\w.)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}\b)?"
"""A decimal number as a regular expression without groups: sign, thousands separated by commas, exponent."""
FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
"""A Markdown code fence, closed or truncated; group 1 is its content."""
THINKING = re.compile(r"<think(?:ing)?>(?:(?!<think(?:ing)?>).)*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
"""A reasoning model's notes before its answer, closed or truncated."""

_QUOTES = " \"'`"
_PLAIN_QUOTES = {ord(c): "'" for c in "\u2018\u2019\u201a\u2032"} | {
    ord(c): '"' for c in "\u201c\u201d\u201e\u2033\u00ab\u00bb"
}
_RAISED = re.compile(r"[\u00aa\u00b2\u00b3\u00b9\u00ba\u2070-\u209c\u1d2c-\u1d6a]")
_KEPT = re.compile(r"\0(\d+);")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)|\n+")
_APOLOGY = r"(?:(?:well|sorry|unfortunately|i'm sorry|i am sorry|i'm afraid|i apologi[sz]e)[, ]+(?:but |that )?)*"
_ABOUT = r"(?:(?!\b(?:but|however|maybe|perhaps|probably|guess|think|believe)\b)[^,;:])*"
_DECLINES = re.compile(
    rf"{_APOLOGY}(?:"
    r"i (?:really |honestly |just )?(?:do not|don't|cannot|can't) (?:know|say|tell|answer|determine)\b"
    r"|(?:i'm|i am) not (?:really |quite |entirely )?(?:sure|certain|aware|familiar)\b|no idea$|not sure$"
    r"|i (?:have no|do not have any|don't have any|do not have enough|don't have enough|do not have|don't have) "
    r"(?:idea|information|knowledge|data)\b"
    r"|there (?:is no|isn't any|are no) such\b"
    r"|there (?:is no|isn't a) (?:\w+ ){1,3}(?:called|named|known as)\b"
    r"|(?:the|this) (?:text|passage|story|context|question) (?:does not|doesn't) (?:say|mention|state|specify|tell)\b"
    r"|(?:it|this|that|the answer) (?:is not possible|isn't possible|is impossible) to "
    r"(?:say|tell|know|determine|answer)\b"
    r"|(?:it|this|that|the answer) (?:cannot|can't) be (?:known|determined|answered)\b"
    r"|none of (?:the|these) (?:\w+ )?tools (?:can|could|is|are)\b"
    rf"){_ABOUT}"
)
"""One sentence, normalised, that declines a question in plain words and suggests no answer."""
COURTESY = re.compile(
    r"(?:let me know|feel free|please (?:let me know|provide|feel free)|i hope|would you like|"
    r"do you (?:need|want|have)|is there anything|if you (?:need|have|want|would)|can you|could you)\b.*"
)
"""A polite sentence, normalised, that says nothing about the question."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, normalised; empty ones are left out."""
    return [part for raw in _SENTENCE_END.split(text) if (part := normalise(raw))]


def abstains(text: str) -> bool:
    """Whether a text declines in plain words ("I don't know.", "There is no such country.") and says nothing else."""
    said = [sentence for sentence in sentences(text) if not COURTESY.fullmatch(sentence)]
    return normalise(text) == normalise(ABSTENTION) or (bool(said) and all(map(_DECLINES.fullmatch, said)))


def declines_somewhere(text: str) -> bool:
    """Whether a text declines, even if it goes on to guess ("I don't know, but maybe Paris.")."""
    return any(map(_DECLINES.match, sentences(text)))


def normalise(text: str) -> str:
    """Text with case folded, characters in one form, white space collapsed, outer quotes and full stop removed.

    Superscripts and subscripts stay: x\u00b2 is not x2. A text of nothing but punctuation stays as it is.
    """
    text = re.sub(r"\s+", " ", _one_form(text).casefold()).strip()
    return text.strip(_QUOTES).rstrip(".!\u2026").strip(_QUOTES) or text


def _one_form(text: str) -> str:
    """Unicode NFKC without its changes of superscripts and subscripts; typographic quotes become plain ones."""
    if text.isascii():
        return text
    if _RAISED.search(text):
        text = _RAISED.sub(lambda match: f"\0{ord(match[0])};", text)
    text = unicodedata.normalize("NFKC", text)
    return _KEPT.sub(lambda match: chr(int(match[1])), text).translate(_PLAIN_QUOTES)


def without_thinking(text: str) -> str:
    """A text without the notes that a reasoning model writes between <think> and </think>."""
    return THINKING.sub("", text) if "<think" in text else text


def strip_fences(text: str) -> str:
    """The content of the first code fence, or the whole text without one."""
    found = FENCE.search(text)
    return found.group(1) if found else text


def last_user_message(messages: Iterable[Message]) -> str:
    """The content of the last message with the role `user`; empty without one."""
    return next((m.content for m in reversed(tuple(messages)) if m.role == "user"), "")


def system_prompt(messages: Iterable[Message]) -> str:
    """The system messages of a conversation as one text with white space collapsed; empty without one."""
    return " ".join(" ".join(m.content for m in messages if m.role == "system").split())


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    if not one or not two or one[0] != two[0]:
        return 0
    longest = min(len(one), len(two))
    return bisect_left(range(1, longest + 1), True, key=lambda n: one[:n] != two[:n])
