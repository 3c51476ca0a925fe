"""How long a recipe's training rows are, before any is tokenized: by their bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES_PER_TOKEN = 3.0
"""Cautious: the tiny recipe's vocabulary of 1,024 has 3.2 on its own data, larger ones more on English and code."""
OWN_TEMPLATE, TEMPLATE = 6, 40
"""Tokens that the template of stage `tokenizer` adds to a question, and the most that those of known models do."""
DRAWN = 30
"""Questions drawn of each cell of the world."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of a model's training rows: the longest whole row, the longest answer, a row on average. `count` rows."""

    count: int
    longest: int
    answer: int
    mean: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of training rows, `longest` question and answer together."""

    count: int
    longest: int
    answer: int
    mean: float

    def rows(self, template: int, length: int | None = None) -> Rows:
        """The same in tokens, with those of the template; `length` is what the longest row has if one knows better."""
        longest = length or template + math.ceil(self.longest / BYTES_PER_TOKEN)
        answer = min(longest, 1 + math.ceil(self.answer / BYTES_PER_TOKEN))
        return Rows(self.count, longest, answer, min(longest, template + self.mean / BYTES_PER_TOKEN))


def _sizes(pairs: Sequence[tuple[int, int]], count: int) -> Sizes:
    whole = [question + answer for question, answer in pairs]
    return Sizes(count, max(whole), max(answer for _, answer in pairs), sum(whole) / len(whole))


def world_sizes(config: Any) -> Sizes:
    """Of stage `world`, by drawing some questions of each of its cells; `count` is an upper bound."""
    from cogumi.data.world import DIFFICULTIES, DOMAINS, make

    rng, pairs, count = random.Random(0), [], 0
    for domain in DOMAINS:
        for difficulty in DIFFICULTIES:
            tasks = [make(domain, difficulty, rng) for _ in range(DRAWN)]
            pairs += [(len(task.question.encode()), len(task.answer.encode())) for task in tasks]
            count += config.train_by_domain.get(domain, config.train)
    return _sizes(pairs, count)


def file_sizes(config: Any, root: Path) -> Sizes | None:
    """Of stage `files`, by reading them; None if one is missing or no row can be used, which is told elsewhere."""
    from cogumi.core.types import Example
    from cogumi.data.sources.question_files import iterate

    paths = [root / path for paths in config.files.values() for path in paths]
    if not all(path.is_file() for path in paths):
        return None
    found = [row for path in paths for row in iterate(path) if isinstance(row, Example)]
    pairs = [(sum(len(m.content.encode()) for m in e.messages), len(e.answer.encode())) for e in found]
    parts = config.train + config.selection + config.fit + config.threshold + config.heldout
    return _sizes(pairs, len(pairs) * config.train // parts) if pairs else None
