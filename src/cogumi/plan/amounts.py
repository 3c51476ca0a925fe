"""Amounts as people write them."""

from __future__ import annotations

import re

from cogumi.errors import RecipeError


def parse_bytes(text: str) -> int:
    """`80GB`, `890MB`, `24 GiB` as bytes, in any case of letters; `RecipeError` for anything else, and for nothing."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"'{text}' is no amount of bytes; write it like 80GB or 24GiB")
    number, prefix, binary = match.groups()
    found = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if not found:
        raise RecipeError(f"'{text}' is less than a byte; ask for more")
    return found


def parse_rate(text: str) -> int:
    """`50GB/s` as bytes per second; `RecipeError` for anything else."""
    amount, slash, second = text.strip().rpartition("/")
    if not slash or second.strip().lower() != "s":
        raise RecipeError(f"'{text}' is no bandwidth; write it like 50GB/s")
    return parse_bytes(amount)
