"""Equality of formulas in LaTeX, by the library `math-verify` (SPEC B3)."""

from __future__ import annotations

import logging
import threading
from typing import Any

from cogumi.core.packages import load

SECONDS, LONGEST = 3, 2_000
"""Time for one formula, where it can be limited: in the main thread. Characters at the end of a text that are read."""


def parsed(text: str) -> list[Any]:
    """The formula that a text commits to, in the forms that `equal` takes; empty if it has none.

    Raises `PackageError` without the library.
    """
    library = load("math_verify", "a check of kind 'math'")
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports what it cannot read at every call
    found: list[Any] = library.parse(text[-LONGEST:], parsing_timeout=_limit(), raise_on_error=False)
    return found


def equal(wanted: str, found: str) -> bool:
    """Whether two texts commit to formulas that are equal as mathematics."""
    library = load("math_verify", "a check of kind 'math'")
    return bool(library.verify(parsed(wanted), parsed(found), timeout_seconds=_limit(), raise_on_error=False))


def _limit() -> int | None:
    """The library limits time by a signal, which only the main thread receives."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
