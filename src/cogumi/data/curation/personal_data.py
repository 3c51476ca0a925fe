"""Rule: no personal data: e-mail addresses, telephone numbers, bank and card numbers, US social security numbers,
public IP addresses, keys of well-known services (SPEC A5). They are replaced by their kind, or the row is dropped.

Numbers are validated (telephone plans by phonenumbers, check digits by python-stdnum), so that most long numbers are
not taken for personal ones; one in ten random numbers of 16 digits is a valid card number. Names and places are not
found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cogumi.core.packages import load
from cogumi.core.types import Example
from cogumi.data.examples import example_id

REMEDY = "set `personal_data: {action: redact}`"
ANSWER = -1
"""The part of a row that is its answer; other parts are numbers of messages."""

Found = tuple[str, int, int]
"""Kind, begin and end of a piece of text."""

_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[a-zA-Z]{2,24}\b")
_RESERVED = re.compile(r"(?:^|[@.])(?:example\.(?:com|org|net)|test|invalid|localhost)$")
"""Domains for documentation (RFC 2606)."""
_KEYS = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{36,}|\bAIza[0-9A-Za-z_-]{35}"
    r"|\bxox[abprs]-[0-9A-Za-z-]{10,}|\bhf_[A-Za-z0-9]{30,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\w.,])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{2,4}(?![\w.,]\d)")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]\d)")
_PHONE_LIKE = re.compile(r"\+\d|\(\d{2,5}\)|\d[-. /]\d{2,}")
_WRITTEN_AS_PHONE = re.compile(r"^\+|^(?=.*\d{3}).*\d[-. )/]+\d")
"""A country code, or separated groups of digits of which one is longer than two: no counting from 1 to 10."""


class Settings(BaseModel):
    """`redact` replaces what was found by its kind, as in `<e-mail address>`; `drop` drops the row."""

    model_config = ConfigDict(extra="forbid")
    action: Literal["redact", "drop"] = "redact"


def measure(example: Example, region: str | None) -> list[list[Any]]:
    """What was found, as [kind, part, begin, end]; telephone numbers without country code are those of `region`."""
    parts = [(number, message.content) for number, message in enumerate(example.messages)]
    return [
        [kind, part, begin, end]
        for part, text in [*parts, (ANSWER, example.answer)]
        for kind, begin, end in find(text, region)
    ]


def find(text: str, region: str | None) -> list[Found]:
    """Personal data in a text, in order, without overlaps."""
    found: list[Found] = []
    for kind, begin, end in sorted(_candidates(text, region), key=lambda one: (one[1], -one[2])):
        if not found or begin >= found[-1][2]:
            found.append((kind, begin, end))
    return found


def redact(example: Example, found: Iterable[tuple[str, int, int, int]]) -> Example:
    """The row with each piece replaced by its kind in angle brackets; the id follows the question."""
    parts = {number: message.content for number, message in enumerate(example.messages)} | {ANSWER: example.answer}
    for kind, part, begin, end in sorted(found, key=lambda one: -one[2]):
        parts[part] = f"{parts[part][:begin]}<{kind}>{parts[part][end:]}"
    messages = tuple(replace(message, content=parts[number]) for number, message in enumerate(example.messages))
    return replace(example, id=example_id(example.domain, messages), messages=messages, answer=parts[ANSWER])


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from what was found in a row to the reason why it is dropped, or None."""

    def reason(value: Any) -> str | None:
        return f"holds: {value[0][0]}" if value and settings.action == "drop" else None

    return reason


def _candidates(text: str, region: str | None) -> Iterator[Found]:
    for found in _KEYS.finditer(text):
        yield "key", *found.span()
    if "@" in text:
        for found in _EMAIL.finditer(text):
            if not _RESERVED.search(found.group().casefold()):
                yield "e-mail address", *found.span()
    if not re.search(r"\d{2}", text):
        return
    for kind, pattern, valid in (
        ("bank account number", _IBAN, load("stdnum.iban", "rule 'personal_data'").is_valid),
        ("card number", _CARD, load("stdnum.luhn", "rule 'personal_data'").is_valid),
        ("social security number", _SSN, load("stdnum.us.ssn", "rule 'personal_data'").is_valid),
        ("IP address", _IP, _is_public),
    ):
        for found in pattern.finditer(text):
            if valid(found.group().replace(" ", "").replace("-", "") if kind == "card number" else found.group()):
                yield kind, *found.span()
    if _PHONE_LIKE.search(text):
        phonenumbers = load("phonenumbers", "rule 'personal_data'")
        for match in phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.VALID):
            if _WRITTEN_AS_PHONE.search(match.raw_string) and text[max(0, match.start - 1) : match.start] not in tuple(
                ".,-/"
            ):
                yield "telephone number", match.start, match.end


def _is_public(text: str) -> bool:
    try:
        return IPv4Address(text).is_global
    except AddressValueError:
        return False
