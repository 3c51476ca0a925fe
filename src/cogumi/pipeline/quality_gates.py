"""Quality gates: a bound on a step's metric, alone or relative to the same metric of another step (SPEC H1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogumi.core.errors import GateError
from cogumi.core.registry import nearest
from cogumi.core.types import Artifact
from cogumi.pipeline.recipe import GateSpec


def _metric(name: str, path: str, metrics: Mapping[str, Any]) -> float:
    """The number at a dotted path of a step's metrics."""
    value: Any = metrics
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else ()
            raise GateError(f"step '{name}' has no metric '{path}' ('{part}'; {nearest(part, known)})")
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GateError(f"step '{name}': the metric '{path}' is not a number but {value!r}")
    return float(value)


def check_gate(step: str, gate: GateSpec, done: Mapping[str, Artifact]) -> None:
    """Raise `GateError` with the value and the bound if a step's metric violates the gate or is not a number."""
    value = _metric(step, gate.metric, done[step].metrics)
    scale, relation = 1.0, ""
    if gate.relative_to is not None:
        scale = _metric(gate.relative_to, gate.metric, done[gate.relative_to].metrics)
        relation = f" times the {scale:g} of step '{gate.relative_to}'"
    if gate.at_least is not None:
        passed, bound = value >= gate.at_least * scale, f"at least {gate.at_least:g}"
    if gate.at_most is not None:
        passed, bound = value <= gate.at_most * scale, f"at most {gate.at_most:g}"
    if not passed:
        raise GateError(
            f"step '{step}' failed its gate: {gate.metric} is {value:g} and must be {bound}{relation}; "
            "its files are kept: change the recipe or the gate and run the same command again"
        )
