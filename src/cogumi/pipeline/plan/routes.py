"""Which ways of making a bundle smaller fit a budget, and which of those that do costs least (SPEC D1).

A route changes up to four things, in the order of what each is expected to cost in quality: rarely used ids of the
vocabulary (SPEC A11), adapters in fewer bits (SPEC D7), weights in fewer bits (SPEC D4, D5), and last whole layers and
neurons (SPEC D3), whose loss only further training makes up for. A route without the later changes comes before any
route with them.
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
"""Ids that a vocabulary may be cut to."""
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
"""Types of the base from most bits to fewest; any other that is asked for has its place among them by its bits."""
KEPT = (1.0, 0.75, 0.5)
"""Shares of layers, and of the neurons of each, that shrinking may leave."""
ADAPTERS = ((32, "q8_0"), (32, "q4_0"))
"""Rank and type of adapters that stage `compress_adapter` has made smaller, where that makes them smaller."""
BLOCK = 256
"""Neurons are left in whole blocks of the K types."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What there is: bytes on disk, bytes of memory, tokens per second. None: not asked."""

    disk: int | None = None
    ram: int | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        speed = self.tokens_per_second
        if speed is not None and not 0 < speed < math.inf:
            raise RecipeError(f"{speed:g} tokens per second is no speed; ask for a number above 0")


@dataclass(frozen=True)
class Route:
    """One way to make the bundle. `ceiling` is tokens per second at most; None without a bandwidth."""

    parts: Parts
    changes: tuple[str, ...]
    serving: Serving
    budget: Budget
    bandwidth: float | None

    @cached_property
    def memory(self) -> Memory:
        """What it takes when it is opened."""
        return memory(self.parts, self.serving)

    @property
    def repack(self) -> bool:
        """Whether llama.cpp may repack its weights: it decodes faster, so wherever the memory allows it."""
        return self.budget.ram is None or self.memory.total(repack=True) <= self.budget.ram

    @property
    def ram(self) -> int:
        """Resident bytes."""
        return self.memory.total(self.repack)

    @property
    def ceiling(self) -> float | None:
        """Tokens per second that memory bandwidth allows."""
        return self.bandwidth / bytes_per_token(self.parts, self.serving) if self.bandwidth else None

    @property
    def missed(self) -> tuple[str, ...]:
        """What of the budget it does not keep, in words; empty if it fits."""
        found, budget, parts = [], self.budget, self.parts
        if budget.disk is not None and parts.bytes > budget.disk:
            found.append(f"{size(parts.bytes)} on disk of {size(budget.disk)}")
        if budget.ram is not None and self.ram > budget.ram:
            found.append(f"{size(self.ram)} in memory of {size(budget.ram)}")
        if budget.tokens_per_second and self.ceiling and self.ceiling < budget.tokens_per_second:
            found.append(f"{self.ceiling:.1f} tokens/s of {budget.tokens_per_second:g}")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Change:
    """How a route differs from what was asked, None where it does not. `layers` and `neurons` are shares that stay."""

    layers: float = 1.0
    neurons: float = 1.0
    type: str | None = None
    adapter: tuple[int, str] | None = None
    vocabulary: int | None = None

    def made(self, parts: Parts) -> Parts:
        """The parts with this change; the draft loses the same ids if it speaks the same vocabulary."""
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

    def said(self, parts: Parts) -> tuple[str, ...]:
        """The same in words."""
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
class Asked:
    """A bundle as it was asked for, and what it must fit into; `bandwidth` is bytes per second, None if not known."""

    parts: Parts
    serving: Serving
    budget: Budget
    bandwidth: float | None = None

    def route(self, change: Change = Change()) -> Route:
        """The bundle with a change."""
        return Route(change.made(self.parts), change.said(self.parts), self.serving, self.budget, self.bandwidth)

    def changes(self) -> Iterator[Change]:
        """All of them, the one that is expected to cost least first."""
        shares = sorted(product(KEPT, KEPT), key=lambda share: share[0] * share[1], reverse=True)
        types = (None, *smaller_types(self.parts.base))
        adapters = (None, *ADAPTERS) if self.parts.adapters else (None,)
        for (layers, neurons), type, adapter, ids in product(shares, types, adapters, (None, *self.vocabularies)):
            yield Change(layers, neurons, type, adapter, ids)

    @property
    def vocabularies(self) -> tuple[int, ...]:
        """Those that the base's can be cut to."""
        return tuple(n for n in VOCABULARIES if n < self.parts.base.shape.vocabulary)

    @cached_property
    def fitting(self) -> Route | None:
        """The route that fits at the least expected cost; None if none does, which the last one tells at once."""
        every = list(self.changes())
        if self.route(every[-1]).missed:
            return None
        return next(route for change in every if not (route := self.route(change)).missed)

    def table(self) -> list[Route]:
        """Every vocabulary in every depth in every type, adapters as they are; most bits and most weights first."""
        base = self.parts.base
        types = sorted(
            dict.fromkeys((*TYPES, base.type)), key=lambda type: -replace(base, type=type, types=()).file.bytes
        )
        ids = (None, *self.vocabularies)
        depths = {shrunk(base.shape, share, 1.0).layers: share for share in sorted(KEPT)}  # of few layers some coincide
        changes = (
            Change(share, 1.0, None if type == base.type else type, None, n)
            for share, n, type in product(reversed(depths.values()), ids, types)
        )
        return [self.route(change) for change in changes]


def shrunk(shape: ModelShape, layers: float, neurons: float) -> ModelShape:
    """A shape with that share of its layers, and of the neurons of each in whole blocks."""
    if (layers, neurons) == (1.0, 1.0):
        return shape
    wide = max(round(neurons * shape.feed_forward / BLOCK), 1) * BLOCK
    return replace(shape, layers=max(round(layers * shape.layers), 1), feed_forward=min(wide, shape.feed_forward))


def smaller_types(base: Weights) -> list[str]:
    """Those of `TYPES` that make the base's file smaller, largest first."""
    sizes = {type: replace(base, type=type, types=()).file.bytes for type in TYPES}
    return [type for type, bytes in sizes.items() if bytes < base.file.bytes]
