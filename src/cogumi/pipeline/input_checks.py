"""Checks the inputs of a step against the declarations of its stage, for `build` and `plan` (SPEC D1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cogumi.core.registry import nearest
from cogumi.core.stage import Stage, matches, needed_inputs, optional_inputs


def input_problems(stage: Stage, config: Any, given: Mapping[str, str | None]) -> Iterator[str]:
    """A line for each input that is missing, of the wrong kind, or unknown to the stage.

    `given` is role -> kind of the artifact; None if the kind is unknown because the step that makes it is invalid.
    """
    needed = needed_inputs(stage, config, given)
    declared = {**optional_inputs(stage), **needed}
    for role in needed:
        if not any(matches(name, role) for name in given):
            yield f"the stage needs an input '{role}'; given: {', '.join(given) or 'none'}"
    for name, kind in given.items():
        kinds = next((declared[role] for role in declared if matches(name, role)), None)
        if kinds is None:
            yield f"the stage has no input '{name}'; {nearest(name, declared)}"
        elif kind is not None and kind not in kinds.split("|"):
            yield f"input '{name}' is of kind {kind}, not {kinds.replace('|', ' or ')}; take another step's"
