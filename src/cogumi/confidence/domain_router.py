"""Choice of the modifier for a question (SPEC F5), and of the modifier to load before it is needed (SPEC F6).

One threshold decides about preloading, on the router's view of the whole question. Thresholds on its first tokens would
decide earlier by less than one reading of the question (on the tiny bundle 1.2 ms with the router), and would save
nothing: the whole answer of the base leaves time to load the modifier.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.confidence.nets import Net

BASE = "base"
PRELOAD = 0.65
"""Domain probability required to load its modifier ahead."""
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


def with_history(domains: Mapping[str, float], history: Mapping[str, int]) -> dict[str, float]:
    """Combine the router with the user's domain history: P(domain | question) P(domain | user), normalised.

    The prior of a user is `(1 - w)` uniform plus `w` = HISTORY_WEIGHT times the smoothed shares of `history` (questions
    per domain, plus HISTORY_PSEUDO pseudo-counts). So history multiplies the odds between two domains by at most
    `1 + w k / (1 - w)` for k domains; without history the probabilities are unchanged.
    """
    if not domains or not any(history.get(name, 0) for name in domains):
        return dict(domains)
    counts = np.array([max(history.get(name, 0), 0) + HISTORY_PSEUDO for name in domains], dtype=np.float64)
    prior = (1 - HISTORY_WEIGHT) / len(domains) + HISTORY_WEIGHT * counts / counts.sum()
    posterior = np.array(list(domains.values())) * prior
    return {name: float(p) for name, p in zip(domains, posterior / posterior.sum(), strict=True)}


def preload(domains: Mapping[str, float], modifiers: Collection[str]) -> str | None:
    """The modifier to load ahead; None if no probability reaches the threshold."""
    name = route(domains, modifiers)
    return name if name is not None and domains[name] >= PRELOAD else None
