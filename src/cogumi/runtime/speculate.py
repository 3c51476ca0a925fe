"""Speculative decoding, the pure part: what to accept of a draft, and when drafting pays.

Acceptance follows Leviathan et al. 2023 and Chen et al. 2023: a token drawn from the draft's q is kept with
probability min(1, p/q), else one is drawn from the residual max(p - q, 0). The result is distributed exactly
as p; at temperature 0 it is the verifier's own greedy choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cogumi.runtime.sampling import draw

Row = NDArray[np.float64]


def verify_greedy(drafted: Sequence[int], best: Callable[[int], int]) -> list[int]:
    """Tokens to emit: drafted ones while they equal the verifier's own, then its own next; 1 to k + 1 of them.

    `best(i)` is the verifier's choice after i emitted tokens. It is asked in order, each i once, and only as far
    as needed: a row may depend on what was emitted before it (penalties, a grammar).
    """
    emitted: list[int] = []
    for i, token in enumerate(drafted):
        emitted.append(best(i))
        if emitted[i] != token:
            return emitted
    emitted.append(best(len(drafted)))
    return emitted


def verify_sampled(
    drafted: Sequence[int], q: Sequence[Row] | None, p: Callable[[int], Row], generator: np.random.Generator
) -> list[int]:
    """Tokens to emit, 1 to k + 1 of them, distributed as if each had been drawn from its own p (V,).

    `p(i)` is the verifier's distribution after i emitted tokens, asked as in `verify_greedy`. `q` holds the
    distributions (V,) that the k drafted ids were drawn from; None means that the draft was deterministic. All
    but the last emitted token are drafted ones that were accepted.
    """
    for i, token in enumerate(drafted):
        row = p(i)
        keep = row[token] if q is None else row[token] / q[i][token]
        if generator.random() < keep:
            continue
        residual = row.copy()
        if q is None:
            residual[token] = 0.0
        else:
            np.maximum(residual - q[i], 0.0, out=residual)
        return [*drafted[:i], draw(residual if residual.any() else row, generator)]
    return [*drafted, draw(p(len(drafted)), generator)]


def expected_tokens(acceptance: float, k: int) -> float:
    """Mean tokens per round when each of `k` drafted tokens is accepted with probability `acceptance`."""
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def expected_speedup(acceptance: float, k: int, draft_cost: float, verify_costs: Sequence[float]) -> float:
    """Throughput with `k` drafted tokens per round over plain decoding.

    `draft_cost` is the time of one drafted token, `verify_costs[i]` that of a base pass over i + 1 tokens.
    """
    seconds = k * draft_cost + verify_costs[k]
    return expected_tokens(acceptance, k) * verify_costs[0] / seconds


def best_k(acceptance: float, draft_cost: float, verify_costs: Sequence[float]) -> int:
    """The number of drafted tokens, 0 included, with the best expected throughput (the smallest on ties)."""
    speedups = [expected_speedup(acceptance, k, draft_cost, verify_costs) for k in range(len(verify_costs))]
    return int(np.argmax(speedups))


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one drafted token, and of base passes over 1, 2, .. tokens."""

    draft: float
    verify: tuple[float, ...]

    @property
    def step(self) -> float:
        """Seconds of a plain base step."""
        return self.verify[0]


class Acceptance:
    """Running share of drafted tokens that the verifier accepts, with a prior worth a few tokens.

    Only tested tokens count: those behind the first rejection of a round were never looked at.
    """

    PRIOR, WEIGHT, MEMORY = 0.7, 10.0, 1000.0

    def __init__(self) -> None:
        self._accepted = self.PRIOR * self.WEIGHT
        self._tested = self.WEIGHT

    def update(self, drafted: int, accepted: int) -> None:
        """Count one round; old rounds fade once more than `MEMORY` tokens are known."""
        self._accepted += accepted
        self._tested += min(accepted + 1, drafted)
        if self._tested > self.MEMORY:
            self._accepted *= self.MEMORY / self._tested
            self._tested = self.MEMORY

    @property
    def rate(self) -> float:
        """Probability that the next drafted token is accepted, as far as known."""
        return self._accepted / self._tested
