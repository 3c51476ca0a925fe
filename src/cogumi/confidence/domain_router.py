"""Which modifier, if any, belongs to a question (SPEC F5), and which to load before it is known for sure (SPEC F6)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.nets import Net

BASE = "base"
PRELOAD = ((3, 0.85), (4, 0.75), (5, 0.65))
"""(tokens read, probability that a domain must have by then to be loaded)."""
HISTORY_WEIGHT = 0.5
HISTORY_PSEUDO = 1.0


def fold(domains: Mapping[str, float], modifiers: Collection[str]) -> dict[str, float]:
    """Router probabilities over `base` and the modifiers: what has no modifier is the base's business."""
    folded = {name: domains.get(name, 0.0) for name in modifiers}
    return {BASE: max(0.0, 1.0 - sum(folded.values())), **folded}


def route(domains: Mapping[str, float], modifiers: Collection[str]) -> str | None:
    """The modifier more probable than every other and than the base; None where that is the base."""
    folded = fold(domains, modifiers)
    best = max(folded, key=lambda name: folded[name])
    return None if best == BASE else best


def in_scope(domains: Mapping[str, float], scope: float) -> bool:
    """Whether a question is of a kind that the router knows: some probability reaches `scope`.

    A softmax is most sure of what it was trained on (Hendrycks and Gimpel 2017); `scope_for` says where to cut.
    """
    return max(domains.values(), default=0.0) >= scope


def confidences(router: Net, x: ArrayLike) -> NDArray[np.float64]:
    """The highest probability of each row [n] of x [n, in]."""
    return np.array([max(router.probabilities(row).values()) for row in np.asarray(x)])


def scope_for(known: ArrayLike, false_alarms: float) -> float:
    """The cut below which at most a share `false_alarms` of known questions falls, from their `confidences`."""
    found = np.sort(np.asarray(known, dtype=np.float64))
    return float(found[int(false_alarms * len(found))]) if len(found) else 0.0


def with_history(
    domains: Mapping[str, float], history: Mapping[str, int], *, weight: float = HISTORY_WEIGHT
) -> dict[str, float]:
    """Probabilities once the user's habit is known: P(domain | question) P(domain | user), normalised.

    The prior of a user is `(1 - weight)` uniform plus `weight` times the smoothed shares of `history` (questions per
    domain, HISTORY_PSEUDO made-up ones of each domain added). So no habit multiplies the odds between two domains by
    more than `1 + weight k / (1 - weight)` for k domains; without history nothing changes.
    """
    if not domains or not any(history.get(name, 0) for name in domains):
        return dict(domains)
    counts = np.array([max(history.get(name, 0), 0) + HISTORY_PSEUDO for name in domains], dtype=np.float64)
    prior = (1 - weight) / len(domains) + weight * counts / counts.sum()
    posterior = np.array(list(domains.values())) * prior
    return {name: float(p) for name, p in zip(domains, posterior / posterior.sum(), strict=True)}


def preload(domains: Mapping[str, float], modifiers: Collection[str], tokens: int) -> str | None:
    """The modifier to load already after `tokens` tokens of the question; None while that is a guess."""
    bar = next((bar for least, bar in reversed(PRELOAD) if tokens >= least), None)
    name = route(domains, modifiers)
    return name if name is not None and bar is not None and domains[name] >= bar else None
