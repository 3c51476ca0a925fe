"""Numbers in free text: a quantity in every usual spelling, and the one that an answer commits to (SPEC B3).

Read are signs before and after a currency, thousands separated by commas, spaces or apostrophes (also Indian and
European), fractions and mixed numbers, ratios and times (3:30), percentages, "80k" and "1.5 million", powers of ten,
LaTeX, and the digits of every script. Digits inside a word ("m2", "H2O") or in a version ("3.1.2") are no numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from cogumi.core.text import COURTESY, normalise, without_thinking

LONGEST = 400
"""Characters of the longest number; a longer run of digits is none."""

SCALES = {
    "k": 3, "thousand": 3, "m": 6, "mn": 6, "million": 6, "b": 9, "bn": 9, "billion": 9, "t": 12, "trillion": 12,
}  # fmt: skip
"""Exponents of ten of the words and letters for large numbers."""
_CURRENCY = r"(?:[$\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|JPY|INR|Rs\.?)\b)"
_SPACE = "[ \u00a0\u2009\u202f]"
_WHOLE = (
    rf"(?:\d{{1,3}}(?:,\d{{3}})++(?!,?\d)|\d{{1,2}}(?:,\d{{2}}(?!\d))++,\d{{3}}(?!,?\d)"
    rf"|\d{{1,3}}(?:{_SPACE}\d{{3}})++(?!{_SPACE}?\d)|\d{{1,3}}(?:['\u2019]\d{{3}})++(?!\d)|\d++)"
)
_QUANTITY = re.compile(
    rf"""
    (?P<skip>\d++(?:\.\d++){{2,}}+(?!,?\d)|\d++(?:\.\d++)?[eE][-+]?\d{{4,}})
    |(?P<sign>(?<![\w.)\]}}%^])[-+](?=[\d.]|{_CURRENCY}\s?[\d.])|(?<=[=:(]\ )-(?=\s{_CURRENCY}?[\d.])
        |\b(?:minus|negative)(?=\s\d))?
    \s?(?:{_CURRENCY}\s?(?P<inner>-)?)?
    (?<![^\W\d_])(?<!\d\.)(?<!\^)(?<!\^-)
    (?:(?:(?P<mixed>\d++)(?:\s+|-)(?=\d++\s?/))?(?P<top>\d++)\s?/\s?(?P<bottom>\d++)(?![\d/.])
        |(?P<parts>\d++(?::\d++)++)
        |(?P<european>\d{{1,3}}(?:\.\d{{3}})++,\d++)
        |(?P<number>{_WHOLE}(?:\.\d++)?|(?<![\w)\]])\.\d++)
            (?:[eE](?P<exponent>[-+]?\d{{1,3}})\b|\s?[\u00d7xX*]\s?10\^(?P<ten>[-+]?\d{{1,3}})|\^(?P<power>\d{{1,2}})(?!\d))?
    )
    (?:\s?(?P<percent>%|per\ ?cent\b)|(?P<short>[kKMB]|bn|mn)\b|\s(?P<scale>thousand|million|billion|trillion|bn|mn)\b)?
    """,
    re.VERBOSE,
)
_LATEX = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\{,\}|,\\!", ","),
        (r"(?<=\d)(?:\\[,;: ]|~)(?=\d)", " "),
        (r"\\([%$])", r"\1"),
        (r"\\(?:text|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
        (r"(?<=\d)\s*\\[dt]?frac\s*\{?\s*(\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?", r" \1/\2"),
        (r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1\2/\3\4"),
        (r"\\(?:times|cdot)\b\s?", "\u00d7"),
        (r"\^\{([-+]?\d+)\}", r"^\1"),
    )
)
_RAISED = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_RAISED_DIGITS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_DASH = re.compile(rf"[\u2013\u2212\ufe63\uff0d](?=\s?{_CURRENCY}?\s?[\d.])")
_MINUS = re.compile("[\u2212\ufe63\uff0d]")
_MARKED = re.compile(
    r"####\s*|\\boxed\{|(?i:\banswer)\b[*_]*(?:\s+(?:is|are|was|would\s+be|should\s+be|comes\s+to|equals))?"
    r"[\s:=*_$\"'(\\]*(?:(?i:approximately|about|roughly|around|exactly|equal\s+to)\s+)?(?:[a-zA-Z]\s?=\s?)?"
)
_OPERATOR = re.compile(r"\s*(?:[-+*/\u00d7\u00f7=^]|\bx\b)")
_SENTENCE_END = re.compile(r"[.!?]\s|\n|$")


@dataclass(frozen=True, slots=True)
class Quantity:
    """One value, or the several `parts` of a ratio or a time; `percent` if a percent sign follows."""

    parts: tuple[Fraction, ...]
    percent: bool = False

    def __str__(self) -> str:
        text = ":".join(
            str(part.numerator) if part.denominator == 1 else _decimal(part) or str(part) for part in self.parts
        )
        return f"{text}%" if self.percent else text

    def share(self) -> Quantity:
        """A percentage as a share of one; other quantities unchanged."""
        return Quantity(tuple(part / 100 for part in self.parts)) if self.percent else self

    def times(self, factor: Fraction) -> Quantity:
        """This quantity times a number."""
        return Quantity(tuple(part * factor for part in self.parts), self.percent)

    def near(self, other: Quantity, absolute: Fraction, relative: Fraction) -> bool:
        """Whether this quantity is at most so far from `other`, the right one; percent signs are ignored."""
        if len(self.parts) != len(other.parts):
            return False
        return all(abs(a - b) <= max(absolute, relative * abs(b)) for a, b in zip(self.parts, other.parts, strict=True))


def _decimal(value: Fraction) -> str:
    """A fraction as a decimal number if that is exact and short, else empty."""
    for digits in range(1, 21):
        if (value * 10**digits).denominator == 1:
            return f"{Decimal(int(value * 10**digits)).scaleb(-digits)}"
    return ""


def quantities(text: str) -> list[Quantity]:
    """All quantities of a text, in order."""
    return [quantity for quantity, _, _ in _found(_plain(text))]


def committed(text: str) -> Quantity | None:
    """The quantity that an answer commits to: after its last "####", `\\boxed{` or "answer is", else its last one.

    Notes inside <think> and polite last sentences are left out.
    """
    plain = _plain(without_thinking(text))
    for mark in reversed(list(_MARKED.finditer(plain))):
        if quantity := _after(plain, mark):
            return quantity
    found = [quantity for quantity, _, _ in _found(_without_courtesy(plain))]
    return found[-1] if found else None


def _after(plain: str, mark: re.Match[str]) -> Quantity | None:
    """The quantity that begins right after a mark; of a calculation ("16 - 3 = 13") the result."""
    end = plain.find("}", mark.end()) if mark[0].endswith("boxed{") else -1
    if end < 0:
        end = _sentence_end(plain, mark.end())
    part = plain[mark.end() : end]
    found = list(_found(part))
    if not found or part[: found[0][1]].strip(" \t*_$\"'("):
        return None
    if not _OPERATOR.match(part, found[0][2]):
        return found[0][0]
    return found[-1][0] if "=" in part else None


def _sentence_end(plain: str, start: int) -> int:
    end = _SENTENCE_END.search(plain, start)
    return end.start() if end else len(plain)


def _without_courtesy(text: str) -> str:
    """A text without its polite last sentences, which may hold numbers ("Let me know if you need 2 more.")."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text.strip())
    while len(parts) > 1 and COURTESY.fullmatch(normalise(parts[-1])):
        parts.pop()
    return "\n".join(parts)


def _plain(text: str) -> str:
    """A text with plain digits and minus signs, and without LaTeX's spelling of numbers."""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c, c)) for c in text)
        text = _VULGAR.sub(_written_out, text)
        text = _RAISED.sub(lambda match: f"^{match[0].translate(_RAISED_DIGITS)}", text)
        text = _MINUS.sub("-", _DASH.sub("-", text))
    if "\\" in text or "{" in text:
        for pattern, by in _LATEX:
            text = pattern.sub(by, text)
    return text


def _written_out(match: re.Match[str]) -> str:
    """\u00bd -> 1/2, apart from a whole number before it."""
    top_and_bottom = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    return f" {top_and_bottom}" if match.string[match.start() - 1 : match.start()].isdigit() else top_and_bottom


def _found(plain: str) -> Iterator[tuple[Quantity, int, int]]:
    """The quantities of a plain text with their positions."""
    for match in _QUANTITY.finditer(plain):
        if match["skip"] is None and match.end() - match.start() <= LONGEST and (parts := _parts(match)):
            negative = (match["sign"] or "+") != "+" or match["inner"]
            if negative:
                parts = (-parts[0], *parts[1:])
            yield Quantity(parts, match["percent"] is not None), match.start(), match.end()


def _parts(match: re.Match[str]) -> tuple[Fraction, ...]:
    """The unsigned values of a match; none for a division by zero."""
    if match["top"]:
        if not int(match["bottom"]):
            return ()
        value = Fraction(int(match["top"]), int(match["bottom"])) + int(match["mixed"] or 0)
    elif match["parts"]:
        return tuple(Fraction(int(part)) for part in match["parts"].split(":"))
    elif match["european"]:
        value = Fraction(match["european"].replace(".", "").replace(",", "."))
    else:
        value = Fraction(re.sub(r"[^\d.]", "", match["number"]))
    if ten := match["exponent"] or match["ten"]:
        value *= Fraction(10) ** int(ten)
    if match["power"]:
        value **= int(match["power"])
    if scale := match["short"] or match["scale"]:
        value *= 10 ** SCALES[scale.casefold()]
    return (value,)
