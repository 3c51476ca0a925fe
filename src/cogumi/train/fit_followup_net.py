"""Training of the classifier of dissatisfied follow-ups, and the choice of its threshold (SPEC F7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cogumi.models.followup_lstm import FollowUpNet, Row, pad

Metric = Callable[[NDArray[np.bool_], NDArray[np.bool_]], float]
"""metric(labels, predictions), larger is better."""


def fit(
    net: FollowUpNet,
    rows: Sequence[Row],
    targets: NDArray[np.float32],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 64,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> None:
    """Train on probabilities [rows] by cross-entropy (AdamW, one cycle); the same seed gives the same net.

    Rows of similar length share a batch; `progress(batches done, batches in total, last loss)`.
    """
    order = np.random.default_rng(seed)
    lengths = [int((marks > net.marks.num_embeddings - 5).sum()) for _, marks in rows]  # of the follow-ups
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    total, done = epochs * -(-len(rows) // batch), 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net.train()
        for _ in range(epochs):
            for chosen in batches(lengths, batch, order):
                ids, marks = pad([rows[i] for i in chosen])
                loss = nn.functional.binary_cross_entropy_with_logits(
                    net(ids, marks), torch.from_numpy(targets[chosen])
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                progress(done, total, loss.item())
    net.eval()


def batches(lengths: Sequence[int], batch: int, order: np.random.Generator) -> list[NDArray[np.int64]]:
    """Every row once: shuffled, sorted by length within pools of 32 batches, then the batches are shuffled."""
    shuffled = order.permutation(len(lengths))
    pools = [shuffled[i : i + 32 * batch] for i in range(0, len(shuffled), 32 * batch)]
    found = []
    for pool in pools:
        pool = pool[np.argsort([lengths[i] for i in pool], kind="stable")]
        found += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [found[i] for i in order.permutation(len(found))]


def best_threshold(p: NDArray[np.float64], positive: NDArray[np.bool_], metric: Metric) -> float:
    """The threshold on `p` [rows] with the largest metric(positive, p >= threshold)."""
    thresholds = np.unique(np.quantile(p, np.linspace(0, 1, 201)))
    return float(max(thresholds, key=lambda threshold: metric(positive, p >= threshold)))
