"""How many rows a training run can afford to validate on; a pure function of tokens, not of seconds (SPEC M5)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cogumi.models.tokenization import Row
from cogumi.train.batches import Order
from cogumi.train.loop import LoopConfig

SHARE = 0.1
"""Share of the training cost that validation may take."""
LEAST = 32
"""Rows that are judged even if they cost more: fewer say nothing."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Cost per token, in passes through one layer: of a training step, of a validation, and of the cache, once."""

    train: int
    judge: int
    once: int = 0

    @classmethod
    def of(cls, layers: int, below: int, cached: bool) -> LayerCost:
        """For a model of which the layers above the `below` lowest are trained. A gradient costs as much as a pass."""
        upper = layers - below
        return cls(2 * upper, upper, below) if cached else cls(layers + upper, layers)


@dataclass(frozen=True, slots=True)
class Budget:
    """What validation may cost (`cost`), in passes of a token through one layer, and the `layer` costs of a token."""

    cost: float
    layer: LayerCost

    @classmethod
    def of(cls, rows: Sequence[Row], order: Order, steps: int, layer: LayerCost) -> Budget:
        """The budget of a training run that takes `steps` batches of `order`."""
        tokens = sum(rows[i].size for batch in batches(order, steps) for i in batch)
        distinct = sum(rows[i].size for i in used(order, steps))
        return cls(SHARE * (tokens * layer.train + distinct * layer.once), layer)

    def affordable(self, rows: Sequence[Row], judged: int, share: float = 1.0) -> int:
        """Number of `rows` that can be judged `judged` times with a share of the budget, or `LEAST` if that is more."""
        tokens = sum(row.size for row in rows) / max(len(rows), 1)
        each = tokens * (judged * self.layer.judge + self.layer.once)
        return min(len(rows), max(LEAST, int(share * self.cost / each))) if rows else 0


def batches(order: Order, steps: int) -> list[list[int]]:
    """The batches of the first `steps` steps."""
    epochs = -(-steps // order.per_epoch)
    return [batch for number in range(epochs) for batch in order.epoch(number)][:steps]


def used(order: Order, steps: int) -> list[int]:
    """The rows that occur in the first `steps` steps."""
    return sorted({i for batch in batches(order, steps) for i in batch})


def validations(config: LoopConfig) -> int:
    """Number of validations in a training run that is not stopped early."""
    return -(-config.steps // config.evaluate_every)


def sample(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """`count` random rows (all if None), in their order."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
