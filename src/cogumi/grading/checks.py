"""Validation of `meta["check"]`: the kinds and their required fields. `grading.graders` defines their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogumi.grading.constraints import problem_of_rules

CHECKS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "short_answer": ("answers",),
    "numeric": (),
    "math": (),
    "choice": (),
    "code": ("tests",),
    "tool_call": (),
    "f1": ("at_least",),
    "rouge_l": ("at_least",),
    "constraints": ("rules",),
    "abstain": (),
    "similarity": ("at_least",),
    "judge": (),
}
"""Kind of check -> required fields."""
SCALES = ("thousand", "million", "billion")
"""Units in which a table gives its numbers."""
PERCENT = ("sign", "share")
"""What a percent sign means: nothing, or a hundredth."""


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
    for name in ("tolerance", "relative_tolerance", "at_least"):
        value = check.get(name, 0)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            return f"{name} of a check must be a number from 0 up"
    if check.get("least", 1) not in range(1, 11):
        return "least of a check must be a whole number from 1 to 10"
    if check.get("percent", "sign") not in PERCENT:
        return f"percent of a check must be one of {', '.join(PERCENT)}"
    if check.get("scale", SCALES[0]) not in SCALES:
        return f"scale of a check must be one of {', '.join(SCALES)}"
    if not isinstance(check.get("ordered", True), bool):
        return "ordered of a check must be true or false"
    if "rules" in check and (problem := problem_of_rules(check["rules"])):
        return problem
    return _possible_problem(check.get("possible", []))


def _possible_problem(possible: Any) -> str | None:
    """The error in BFCL's possible calls: [{tool: {argument: [value, ...]}}]."""
    form = "possible of a check must be a list of {tool: {argument: [value, ...]}}"
    if not isinstance(possible, list):
        return form
    for call in possible:
        if not isinstance(call, dict) or len(call) != 1:
            return form
        arguments = next(iter(call.values()))
        if not isinstance(arguments, dict) or not all(isinstance(values, list) for values in arguments.values()):
            return form
    return None
