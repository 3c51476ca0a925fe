"""Equality of formulas in LaTeX, by the library `math-verify` (SPEC B3)."""

from __future__ import annotations

from typing import Any

from cogumi.core.errors import CogumiError


def parsed(text: str) -> list[Any]:
    """The formula that a text commits to, in the forms that `equal` takes; empty if it has none.

    Raises `CogumiError` without the library.
    """
    try:
        from math_verify import parse
    except ImportError as error:
        raise CogumiError("a check of kind 'math' needs the library math-verify: pip install 'cogumi[math]'") from error
    found: list[Any] = parse(text, parsing_timeout=None, raise_on_error=False)
    return found


def equal(wanted: list[Any], found: list[Any]) -> bool:
    """Whether two parsed formulas are equal as mathematics."""
    from math_verify import verify

    return bool(verify(wanted, found, timeout_seconds=None, raise_on_error=False))
