"""Calibration rows: training questions on which compression methods measure the importance of weights (SPEC D4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cogumi.core.errors import DataError
from cogumi.core.types import Example
from cogumi.data.examples import read_examples, split_path
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import make_rows


class Draw(BaseModel):
    """Number of training questions to draw, and the shares of easy, medium and hard ones."""

    model_config = ConfigDict(extra="forbid")
    rows: int = Field(2048, ge=1)
    easy: float = Field(0.3, ge=0)
    medium: float = Field(0.5, ge=0)
    hard: float = Field(0.2, ge=0)

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> Draw:
        if abs(self.easy + self.medium + self.hard - 1) > 1e-6:
            raise ValueError(f"easy, medium and hard are {self.easy}, {self.medium}, {self.hard}; they must sum to 1")
        return self


def group(example: Example) -> str:
    """Difficulty 1 and 2 are easy, 4 and 5 hard; 3 and an unknown difficulty are medium."""
    return {1: "easy", 2: "easy", 4: "hard", 5: "hard"}.get(example.difficulty, "medium")


def draw_rows(examples: Path, tokenizer: HFTokenizer, context: int, draw: Draw, seed: int) -> list[Row]:
    """Rows of the training split of an `examples` artifact, drawn at random in the shares of `draw`.

    If a group has too few questions, the other groups fill the gap. `DataError` if the split is empty,
    `TrainingError` if no row fits the context.
    """
    path = split_path(examples, "train")
    found = read_examples(path)
    if not found:
        raise DataError(f"{path} has no rows to calibrate on; give examples with a training split")
    shuffled = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    wanted = {name: round(draw.rows * getattr(draw, name)) for name in ("easy", "medium", "hard")}
    chosen: list[Example] = []
    others: list[Example] = []
    for example in shuffled:
        name = group(example)
        (chosen if wanted[name] > 0 else others).append(example)
        wanted[name] -= 1
    chosen = [*chosen, *others][: draw.rows]
    return make_rows(chosen, tokenizer, context)
