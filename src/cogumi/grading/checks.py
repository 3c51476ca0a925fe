"""Validation of `meta["check"]`: the kinds and their required fields. `grading.graders` defines their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHECKS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "short_answer": ("answers",),
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
    for name in ("tests", "options", "answers", "rivals"):
        value = check.get(name, [""])
        empty_allowed = name == "rivals"
        if not isinstance(value, list) or not (value or empty_allowed) or not all(isinstance(i, str) for i in value):
            return f"{name} of a check must be a {'' if empty_allowed else 'non-empty '}list of strings"
    if not all(any(c.isalnum() for c in answer) for answer in check.get("answers", ())):
        return "answers of a check must have letters or digits"
    return None
