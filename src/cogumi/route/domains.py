"""Which modifier, if any, belongs to a question (SPEC F5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

BASE = "base"


def fold(domains: Mapping[str, float], modifiers: Collection[str]) -> dict[str, float]:
    """Router probabilities over `base` and the modifiers: what has no modifier is the base's business."""
    folded = {name: domains.get(name, 0.0) for name in modifiers}
    return {BASE: max(0.0, 1.0 - sum(folded.values())), **folded}


def route(domains: Mapping[str, float], modifiers: Collection[str]) -> str | None:
    """The modifier more probable than every other and than the base; None where that is the base."""
    folded = fold(domains, modifiers)
    best = max(folded, key=lambda name: folded[name])
    return None if best == BASE else best
