"""Rule: the answer is coherent: not among the worst share by a reference model's perplexity (SPEC A5).

Short answers have noisy perplexities; the rule is meant for answers of a sentence and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

REMEDY = "lower `drop` of `coherence`"


class Settings(BaseModel):
    """The share of rows to `drop`: those whose answers have the highest perplexity."""

    model_config = ConfigDict(extra="forbid")
    drop: float = Field(0.2, gt=0, lt=1)


def judge(settings: Settings, values: Iterable[Any]) -> Callable[[Any], str | None]:
    """A function from nats per token of an answer to the reason why its row is dropped, or None.

    `values` are those of all rows, None for an answer that does not fit the model's context. Such a row is kept.
    """
    known = np.sort([value for value in values if value is not None])
    limit = known[max(0, math.ceil(len(known) * (1 - settings.drop)) - 1)] if len(known) else math.inf

    def reason(value: Any) -> str | None:
        if value is None or value <= limit:
            return None
        return f"perplexity {math.exp(value):,.1f}, above {math.exp(limit):,.1f} of the best {1 - settings.drop:.0%}"

    return reason
