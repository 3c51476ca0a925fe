"""Training rows made from examples, batches, and their deterministic order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cogumi.core.errors import TrainingError
from cogumi.core.types import Example
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.autocast import missing

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids` `[rows, positions]`, padded on the right, which causal attention ignores; `labels`: `ids` of tokens to
    learn, IGNORE elsewhere; `starts` `[rows]` of the answers; `index` are the rows' positions in the data set. With
    `states` `[rows, positions, hidden]` the model's input is these hidden states (`train.trunk_cache`), not `ids`.
    """

    ids: Tensor
    labels: Tensor
    starts: Tensor
    index: Tensor
    states: Tensor | None = None

    def in_tiles(self) -> Batch:
        """The same batch, with rows padded to whole tiles where the computation is in bf16."""
        more = missing(self.ids.shape[1], self.ids.device.type)
        if not more:
            return self
        ids, labels = pad(self.ids, (0, more)), pad(self.labels, (0, more), value=IGNORE)
        states = None if self.states is None else pad(self.states, (0, 0, 0, more))
        return Batch(ids, labels, self.starts, self.index, states)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        ids, labels, starts, index = (t.to(device) for t in (self.ids, self.labels, self.starts, self.index))
        return Batch(ids, labels, starts, index, None if self.states is None else self.states.to(device))


def make_rows(examples: Sequence[Example], tokenizer: HFTokenizer, context: int) -> list[Row]:
    """One row per example that fits the context. `TrainingError` if that leaves none."""
    if not examples:
        raise TrainingError("no examples to train on or to judge by; check the metrics of the step that made them")
    rows = []
    for example in examples:
        prompt = tokenizer.chat(example.messages)
        ids = (*prompt, *tokenizer.answer(example.answer))
        if len(ids) <= context:
            rows.append(Row(ids, len(prompt), example.id))
    if not rows:
        raise TrainingError(
            f"all {len(examples)} examples are longer than the model's context of {context} tokens; shorten them"
        )
    return rows


def collate(rows: Sequence[Row], index: Sequence[int]) -> Batch:
    """Pad the chosen rows into one batch; only answers have labels (assistant-only loss)."""
    chosen = [rows[i] for i in index]
    width = max(len(row.ids) for row in chosen)
    ids = np.zeros((len(chosen), width), dtype=np.int64)
    labels = np.full((len(chosen), width), IGNORE, dtype=np.int64)
    for r, row in enumerate(chosen):
        ids[r, : len(row.ids)] = row.ids
        labels[r, row.start : len(row.ids)] = row.ids[row.start :]
    starts = torch.tensor([row.start for row in chosen])
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), starts, torch.tensor(list(index)))


@dataclass(frozen=True, slots=True)
class Order:
    """Order of rows: shuffled in every epoch, batched by similar length to reduce padding.

    It is a function of (lengths, size, seed, epoch), so that resuming needs no saved state.
    """

    lengths: tuple[int, ...]
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-len(self.lengths) // self.size)

    def epoch(self, number: int) -> list[list[int]]:
        """All batches of one epoch, every row exactly once."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.lengths))
        pool = 32 * self.size
        batches = []
        for at in range(0, len(order), pool):
            near = sorted(order[at : at + pool].tolist(), key=lambda i: self.lengths[i])
            batches += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        return [batches[i] for i in rng.permutation(len(batches))]
