"""How a model in training does on rows it does not learn from: the loss, and the benchmark that costs nothing more.

Greedy decoding gives a reference answer word for word exactly if each of its tokens is the likeliest where it stands.
So the pass that measures the loss also counts right answers, without generating any (SPEC C1: benchmark scores while
training).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cogumi.models.tokenization import Row
from cogumi.train.batches import collate
from cogumi.train.loop import Apply, Item, Loss
from cogumi.train.losses import answer_figures

TOKENS = 4096
"""Tokens in one pass, padding included: what a large vocabulary's logits over them take is still bearable."""


def applied(model: nn.Module) -> Apply:
    """`Apply` of a model that is not in training."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def apply(function: Callable[[Any, Any], Any], batch: Any) -> Any:
        model.eval()
        return function(model, batch.to(device))

    return apply


def passes(rows: Sequence[Item]) -> Iterator[list[int]]:
    """Indices of all rows, those of like size together, as many as `TOKENS` allow."""
    chosen: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].size):
        if chosen and (len(chosen) + 1) * rows[i].size > TOKENS:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def judge_answers(apply: Apply, rows: Sequence[Row], groups: Sequence[str] = ()) -> dict[str, float]:
    """`loss` (nats per answer token), `exact` (share of answers given word for word), and `exact/<group>` for each.

    `groups` names a group for each row, or is empty; `rows` is not.
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
    asked = Counter(f"exact/{name}" for name in groups) + Counter({"exact": len(rows)})
    shares = {name: right[name] / asked[name] for name in sorted(asked)}
    return {"loss": nats / sum(row.weight for row in rows), **shares}


def mean_figures(
    apply: Apply,
    rows: Sequence[Item],
    loss: Loss,
    collate: Callable[[Sequence[Any], Sequence[int]], Any] = collate,
) -> dict[str, float]:
    """The figures that a loss tells over all rows, weighted by the rows; one that few passes tell, over these."""
    totals: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    for index in passes(rows):
        weight = sum(rows[i].weight for i in index)
        for name, value in apply(loss, collate(rows, index))[1].items():
            totals[name] += value * weight
            weights[name] += weight
    return {name: totals[name] / weights[name] for name in totals}
