"""Validation of a model on held-out rows: loss and exact answers in one pass (SPEC C1).

Greedy decoding reproduces a reference answer exactly if and only if each of its tokens has the largest logit at its
position. So the forward pass for the loss also counts exact answers, without generation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cogumi.models.tokenization import Row
from cogumi.train.autocast import Precision, computing
from cogumi.train.batches import collate
from cogumi.train.loop import Apply, Item, Loss
from cogumi.train.losses import answer_figures

TOKENS = 4096
"""Tokens in one pass, including padding; limits the memory for logits of a large vocabulary."""


def applied(model: nn.Module, precision: Precision = "fp32") -> Apply:
    """`Apply` of a model outside the training loop."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def apply(function: Callable[[Any, Any], Any], batch: Any) -> Any:
        model.eval()
        with computing(precision, device.type):
            return function(model, batch.to(device))

    return apply


def passes(rows: Sequence[Item]) -> Iterator[list[int]]:
    """Batches of row indices, sorted by size, with at most `TOKENS` tokens each."""
    chosen: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].size):
        if chosen and (len(chosen) + 1) * rows[i].size > TOKENS:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def judge_answers(
    apply: Apply,
    rows: Sequence[Row],
    groups: Sequence[str] = (),
    collate: Callable[[Sequence[Any], Sequence[int]], Any] = collate,
) -> dict[str, float]:
    """`loss` (nats per answer token), `exact` (share of exact answers), and `exact/<group>` of each group.

    `rows` must not be empty; `groups` names a group for each row, or is empty.
    """
    nats = 0.0
    right: Counter[str] = Counter()
    for index in passes(rows):
        row_nats, row_right = apply(answer_figures, collate(rows, index))
        nats += float(row_nats.sum())
        for i, good in zip(index, row_right.tolist(), strict=True):
            right["exact"] += good
            if groups:
                right[f"exact/{groups[i]}"] += good
    totals = Counter(f"exact/{name}" for name in groups) + Counter({"exact": len(rows)})
    shares = {name: right[name] / totals[name] for name in sorted(totals)}
    return {"loss": nats / sum(row.weight for row in rows), **shares}


def mean_figures(
    apply: Apply,
    rows: Sequence[Item],
    loss: Loss,
    collate: Callable[[Sequence[Any], Sequence[int]], Any] = collate,
) -> dict[str, float]:
    """Weighted means of a loss's figures over all rows; batches without a figure do not count for it."""
    totals: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    for index in passes(rows):
        weight = sum(rows[i].weight for i in index)
        for name, value in apply(loss, collate(rows, index))[1].items():
            totals[name] += value * weight
            weights[name] += weight
    return {name: totals[name] / weights[name] for name in totals}
