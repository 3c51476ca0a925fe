"""Choice of the modifier for a question (SPEC F5), and of the modifier to load while it is being typed (SPEC F6)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.nets import Net

BASE = "base"
PRELOAD = ((3, 0.85), (4, 0.75), (5, 0.65))
"""(tokens read, domain probability required to load its modifier)."""
HISTORY_WEIGHT = 0.5
HISTORY_PSEUDO = 1.0


def modifier_probabilities(domains: Mapping[str, float], modifiers: Collection[str]) -> dict[str, float]:
    """Probabilities over `base` and the modifiers; domains without a modifier count for the base."""
    folded = {name: domains.get(name, 0.0) for name in modifiers}
    return {BASE: max(0.0, 1.0 - sum(folded.values())), **folded}


def route(domains: Mapping[str, float], modifiers: Collection[str]) -> str | None:
    """The most probable modifier; None if the base is more probable."""
    folded = modifier_probabilities(domains, modifiers)
    best = max(folded, key=lambda name: folded[name])
    return None if best == BASE else best


def in_scope(domains: Mapping[str, float], scope: float) -> bool:
    """Whether a question is in distribution for the router: its highest probability reaches `scope`.

    Maximum softmax probability as an out-of-distribution score (Hendrycks and Gimpel 2017); see `scope_for`.
    """
    return max(domains.values(), default=0.0) >= scope


def confidences(router: Net, x: ArrayLike) -> NDArray[np.float64]:
    """The highest probability of each row [n] of x [n, in]."""
    return np.array([max(router.probabilities(row).values()) for row in np.asarray(x)])


def scope_for(known: ArrayLike, false_alarms: float) -> float:
    """The threshold that a share of at most `false_alarms` of known questions misses, from their `confidences`."""
    found = np.sort(np.asarray(known, dtype=np.float64))
    return float(found[int(false_alarms * len(found))]) if len(found) else 0.0


def with_history(
    domains: Mapping[str, float], history: Mapping[str, int], *, weight: float = HISTORY_WEIGHT
) -> dict[str, float]:
    """Combine the router with the user's domain history: P(domain | question) P(domain | user), normalised.

    The prior of a user is `(1 - weight)` uniform plus `weight` times the smoothed shares of `history` (questions per
    domain, plus HISTORY_PSEUDO pseudo-counts). So history multiplies the odds between two domains by at most
    `1 + weight k / (1 - weight)` for k domains; without history the probabilities are unchanged.
    """
    if not domains or not any(history.get(name, 0) for name in domains):
        return dict(domains)
    counts = np.array([max(history.get(name, 0), 0) + HISTORY_PSEUDO for name in domains], dtype=np.float64)
    prior = (1 - weight) / len(domains) + weight * counts / counts.sum()
    posterior = np.array(list(domains.values())) * prior
    return {name: float(p) for name, p in zip(domains, posterior / posterior.sum(), strict=True)}


def preload(domains: Mapping[str, float], modifiers: Collection[str], tokens: int) -> str | None:
    """The modifier to load after `tokens` tokens of the question; None if no probability reaches the threshold."""
    threshold = next((threshold for least, threshold in reversed(PRELOAD) if tokens >= least), None)
    name = route(domains, modifiers)
    return name if name is not None and threshold is not None and domains[name] >= threshold else None
