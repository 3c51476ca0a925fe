"""Routes: ways to make a bundle fit a budget, and the one with the smallest expected quality loss (SPEC D1).

A route changes up to four things, listed by expected loss, smallest first: rarely used vocabulary ids (SPEC A11), the
type of the adapters (SPEC D7), the type of the weights (SPEC D4, D5), and layers and neurons (SPEC D2, D3), whose loss
only further training can recover. Routes without a later change come before all routes with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from cogumi.compress.gguf.planned_files import Weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.amounts import size
from cogumi.core.errors import RecipeError
from cogumi.core.shapes import ModelShape
from cogumi.pipeline.plan.bundle_memory import Memory, Serving, bytes_per_token, memory

VOCABULARIES = (131_072, 65_536, 32_768)
"""Possible sizes of a trimmed vocabulary."""
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
"""Types of the base from most bits to fewest; another requested type is inserted by its size."""
KEPT = (1.0, 0.75, 0.5)
"""Shares of layers, and of neurons per layer, that shrinking may keep."""
ADAPTERS = ((32, "q8_0"), (32, "q4_0"))
"""Rank and type of adapters compressed by stage `compress_adapter`, used if they become smaller."""
REACHED = 0.5
"""Share of the bandwidth's tokens per second that the runtime usually reaches (0.4 to 0.65)."""
BLOCK = 256
"""The number of neurons stays a multiple of the block size of the K types."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits: bytes on disk, bytes of memory, tokens per second. None: no limit."""

    disk: int | None = None
    ram: int | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        speed = self.tokens_per_second
        if speed is not None and not 0 < speed < math.inf:
            raise RecipeError(f"{speed:g} tokens per second is not a valid speed; give a number above 0")


@dataclass(frozen=True)
class Route:
    """One way to make the bundle: its parts, the changes as text, and what they are checked against."""

    parts: Parts
    changes: tuple[str, ...]
    serving: Serving
    budget: Budget
    bandwidth: float | None
    reached: float

    @cached_property
    def memory(self) -> Memory:
        """Memory of the opened bundle."""
        return memory(self.parts, self.serving)

    @property
    def repack(self) -> bool:
        """Whether llama.cpp may repack weights, which is faster: yes if the memory allows it."""
        return self.budget.ram is None or self.memory.total(repack=True) <= self.budget.ram

    @property
    def ram(self) -> int:
        """Resident bytes."""
        return self.memory.total(self.repack)

    @property
    def ceiling(self) -> float | None:
        """Upper bound of tokens per second by memory bandwidth; None if the bandwidth is unknown."""
        return self.bandwidth / bytes_per_token(self.parts, self.serving) if self.bandwidth else None

    @property
    def speed(self) -> float | None:
        """Expected tokens per second: the share of the upper bound that the runtime reaches."""
        return self.reached * self.ceiling if self.ceiling else None

    @property
    def missed(self) -> tuple[str, ...]:
        """The limits of the budget that the route misses, as text; empty if it fits."""
        found, budget, parts = [], self.budget, self.parts
        if budget.disk is not None and parts.bytes > budget.disk:
            found.append(f"{size(parts.bytes)} on disk of {size(budget.disk)}")
        if budget.ram is not None and self.ram > budget.ram:
            found.append(f"{size(self.ram)} in memory of {size(budget.ram)}")
        if budget.tokens_per_second and self.speed and self.speed < budget.tokens_per_second:
            found.append(f"about {self.speed:.1f} tokens/s of {budget.tokens_per_second:g}")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Change:
    """The changes of a route; None or 1.0: unchanged. `layers` and `neurons` are the shares that remain."""

    layers: float = 1.0
    neurons: float = 1.0
    type: str | None = None
    adapter: tuple[int, str] | None = None
    vocabulary: int | None = None

    def apply(self, parts: Parts) -> Parts:
        """The parts with this change; a draft with the same vocabulary loses the same ids."""
        base, draft, adapters = parts.base, parts.draft, parts.adapters
        base = replace(base, shape=shrunk(base.shape, self.layers, self.neurons))
        if self.type:
            base = replace(base, type=self.type, types=())
        if self.vocabulary:
            base = base.with_ids(self.vocabulary)
            draft = draft.with_ids(self.vocabulary) if draft and parts.shared else draft
        if self.adapter:
            adapters = {name: one.reduced(*self.adapter) for name, one in adapters.items()}
        return replace(parts, base=base, draft=draft, adapters=adapters)

    def describe(self, parts: Parts) -> tuple[str, ...]:
        """The changes as text."""
        base, found = parts.base, []
        if self.vocabulary:
            found.append(f"vocabulary of {self.vocabulary:,} instead of {base.shape.vocabulary:,} ids")
        if self.adapter:
            found.append(f"adapters of rank {self.adapter[0]} in {self.adapter[1]}")
        if self.type:
            found.append(f"{self.type} instead of {base.type}")
        left = shrunk(base.shape, self.layers, self.neurons)
        if left.layers < base.shape.layers:
            found.append(f"{left.layers} instead of {base.shape.layers} layers")
        if left.feed_forward < base.shape.feed_forward:
            found.append(f"{left.feed_forward:,} instead of {base.shape.feed_forward:,} neurons a layer")
        return tuple(found)


@dataclass(frozen=True)
class RouteSearch:
    """A requested bundle and the budget it must fit; `bandwidth` is in bytes per second, None if unknown.

    `reached`: share of the speed that the bandwidth allows; `measured`: measured with this model, on this machine.
    """

    parts: Parts
    serving: Serving
    budget: Budget
    bandwidth: float | None = None
    reached: float = REACHED
    measured: bool = False

    def route(self, change: Change = Change()) -> Route:
        """The route with a change."""
        parts, text = change.apply(self.parts), change.describe(self.parts)
        return Route(parts, text, self.serving, self.budget, self.bandwidth, self.reached)

    def changes(self) -> Iterator[Change]:
        """All changes, smallest expected loss first."""
        shares = sorted(product(KEPT, KEPT), key=lambda share: share[0] * share[1], reverse=True)
        types = (None, *smaller_types(self.parts.base))
        adapters = (None, *ADAPTERS) if self.parts.adapters else (None,)
        for (layers, neurons), type, adapter, ids in product(shares, types, adapters, (None, *self.vocabularies)):
            yield Change(layers, neurons, type, adapter, ids)

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Sizes to which the base's vocabulary can be trimmed."""
        return tuple(n for n in VOCABULARIES if n < self.parts.base.shape.vocabulary)

    @cached_property
    def fitting(self) -> Route | None:
        """The fitting route with the smallest expected loss; None if even the last and smallest route does not fit."""
        every = list(self.changes())
        if self.route(every[-1]).missed:
            return None
        return next(route for change in every if not (route := self.route(change)).missed)

    def table(self) -> list[Route]:
        """Routes for every vocabulary, depth and type, with unchanged adapters; most weights and most bits first."""
        base = self.parts.base
        types = sorted(
            dict.fromkeys((*TYPES, base.type)), key=lambda type: -replace(base, type=type, types=()).file.bytes
        )
        ids = (None, *self.vocabularies)
        depths = {shrunk(base.shape, share, 1.0).layers: share for share in sorted(KEPT)}  # shares may coincide
        changes = (
            Change(share, 1.0, None if type == base.type else type, None, n)
            for share, n, type in product(reversed(depths.values()), ids, types)
        )
        return [self.route(change) for change in changes]


def shrunk(shape: ModelShape, layers: float, neurons: float) -> ModelShape:
    """A shape with these shares of its layers and of the neurons per layer, in whole blocks."""
    if (layers, neurons) == (1.0, 1.0):
        return shape
    wide = max(round(neurons * shape.feed_forward / BLOCK), 1) * BLOCK
    return replace(shape, layers=max(round(layers * shape.layers), 1), feed_forward=min(wide, shape.feed_forward))


def smaller_types(base: Weights) -> list[str]:
    """The `TYPES` that make the base's file smaller, largest first."""
    sizes = {type: replace(base, type=type, types=()).file.bytes for type in TYPES}
    return [type for type, bytes in sizes.items() if bytes < base.file.bytes]
