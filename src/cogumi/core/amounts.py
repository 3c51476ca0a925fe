"""Parsing and formatting of human-readable amounts: bytes, rates, durations, percentages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cogumi.core.errors import RecipeError


def parse_bytes(text: str) -> int:
    """`80GB`, `890MB`, `24 GiB` as bytes, ignoring letter case; `RecipeError` for any other text and for zero."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"'{text}' is not an amount of bytes; write it like 80GB or 24GiB")
    number, prefix, binary = match.groups()
    found = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if not found:
        raise RecipeError(f"'{text}' is less than one byte; give a larger amount")
    return found


def parse_rate(text: str) -> int:
    """`50GB/s` as bytes per second; `RecipeError` for anything else."""
    amount, slash, second = text.strip().rpartition("/")
    if not slash or second.strip().lower() != "s":
        raise RecipeError(f"'{text}' is not a bandwidth; write it like 50GB/s")
    return parse_bytes(amount)


def size(count: float) -> str:
    """Format a number of bytes: 1234567 -> 1.2 MB."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Format a duration: 200 -> 3 min 20 s."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def share(counts: Iterable[Sequence[int]]) -> str:
    """Summed `[correct, n]` pairs as a percentage; a dash if n is 0."""
    pairs = list(counts)
    n = sum(pair[1] for pair in pairs)
    return f"{sum(pair[0] for pair in pairs) / n:.1%}" if n else "-"
