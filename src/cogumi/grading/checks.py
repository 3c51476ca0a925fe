"""The kinds of `meta["check"]`, and what each must hold. `grading.graders` says what they mean."""

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
"""Kinds of `meta["check"]` and the fields each must have; `grading.graders` says what they mean."""


def check_problem(check: Any) -> str | None:
    """What is wrong with a `meta["check"]` value, or None if a grader can use it."""
    if not isinstance(check, dict) or check.get("kind") not in CHECKS:
        return f"check must be an object with a kind out of {', '.join(CHECKS)}"
    missing = [name for name in CHECKS[check["kind"]] if name not in check]
    if missing:
        return f"check of kind {check['kind']} lacks {', '.join(missing)}"
    for name in ("tests", "options"):
        value = check.get(name, [""])
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            return f"{name} of a check must be a list of strings, not empty"
    return None
