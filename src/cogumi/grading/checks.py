"""Validation of `meta["check"]`: the kinds and their required fields. `grading.graders` defines their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHECKS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "numeric": (),
    "choice": (),
    "code": ("tests",),
    "tool_call": (),
    "abstain": (),
}
"""Kind of check -> required fields."""


def check_problem(check: Any) -> str | None:
    """The error in a `meta["check"]` value, or None if it is valid."""
    if not isinstance(check, dict) or check.get("kind") not in CHECKS:
        return f"check must be an object whose kind is one of {', '.join(CHECKS)}"
    missing = [name for name in CHECKS[check["kind"]] if name not in check]
    if missing:
        return f"check of kind {check['kind']} lacks {', '.join(missing)}"
    for name in ("tests", "options"):
        value = check.get(name, [""])
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            return f"{name} of a check must be a non-empty list of strings"
    return None
