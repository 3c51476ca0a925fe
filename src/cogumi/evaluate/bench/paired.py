"""Paired measurements: two ways of doing the same work in turns, and the median of their ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.core.types import Reply, Request
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.protocol import Engine, final_reply

ROUNDS = 5
"""Pairs of measurements per row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `ratio` = `value` / `baseline` (median of paired ratios), both in `unit`; None after a failure.

    `conditions` describe the measurement: `spread` of the ratios, `goal` and whether it is `met`; or the `error`.
    """

    name: str
    ratio: float | None
    value: float | None
    baseline: float | None
    unit: str
    conditions: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings shared by all rows. `words` are ordinary ids of `model`, for a synthetic `shape` in chain order.

    `shape` is None for a user's own file; `bundle` is given if `model` is the base of a bundle. `text` is a text to
    measure perplexity on; `tick(share done)`.
    """

    model: Path
    shape: str | None
    folder: Path
    threads: int
    words: NDArray[np.int64]
    bundle: Path | None = None
    text: str | None = None
    minutes: float = 1.0
    tick: Callable[[float], None] = lambda share: None
    _passages: count[int] = field(default_factory=count)

    def passage(self, n: int) -> tuple[int, ...]:
        """`n` ids in chain order with a new starting point, so that no cache contains them."""
        start = next(self._passages) * 7919 % len(self.words)  # a prime, to visit all starting points
        return tuple(self.words[(start + np.arange(n)) % len(self.words)].tolist())

    def synthetic_shape(self) -> str:
        """The shape; `RequestError` for a user's own file, for which there are no synthetic drafts and adapters."""
        if self.shape is None:
            raise RequestError("this row needs a synthetic model; run it without --model")
        return self.shape


@dataclass(frozen=True, slots=True)
class Pairs:
    """Paired measurements of our way and of the baseline."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Median of the paired ratios."""
        return median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def row(self, name: str, unit: str, *, least: float | None = None, most: float | None = None, **extra: Any) -> Row:
        """A row of medians; `spread` is the range of the paired ratios, `least` or `most` the goal for their median."""
        ratios = sorted(a / b for a, b in zip(self.ours, self.theirs, strict=True))
        conditions: dict[str, Any] = {"spread": [round(ratios[0], 4), round(ratios[-1], 4)], "rounds": len(ratios)}
        if least is not None:
            conditions |= {"goal": f">= {least:g}", "met": self.ratio >= least}
        if most is not None:
            conditions |= {"goal": f"<= {most:g}", "met": self.ratio <= most}
        return Row(name, self.ratio, median(self.ours), median(self.theirs), unit, conditions | extra)


def alternate(
    ours: Callable[[], float], theirs: Callable[[], float], tick: Callable[[float], None], rounds: int = ROUNDS
) -> Pairs:
    """Measure A B, B A, A B, ..., so that slow drifts affect both sides equally."""
    pairs = Pairs([], [])
    for i in range(rounds):
        sides = [(ours, pairs.ours), (theirs, pairs.theirs)]
        for measure, found in sides if i % 2 == 0 else reversed(sides):
            found.append(measure())
        tick((i + 1) / rounds)
    return pairs


def answer(engine: Engine, request: Request) -> Reply:
    """The reply to a single request."""
    return final_reply(engine.generate(request))


def decode_rate(reply: Reply) -> float:
    """Tokens per second after the first token."""
    return (len(reply.tokens) - 1) / (reply.signals["seconds"] - reply.signals["first_token_seconds"])


def ordinary(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """All ids of text tokens, shuffled: prompts for a trained model."""
    ids = [i for i in range(tokenizer.size) if tokenizer.piece(i) and i not in tokenizer.ends]
    return np.random.default_rng(0).permutation(np.array(ids))
