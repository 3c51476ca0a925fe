"""Losses as plain functions `(model, batch) -> (loss, figures)`; a loop takes any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cogumi.train.batches import IGNORE, Batch


def token_nats(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each labelled token from the position before it.

    `hidden` `[rows, positions, width]`, `labels` `[rows, positions]`. Returns nats `[n]` and the row of each. The head
    runs on labelled positions only.
    """
    target = labels[:, 1:]
    row, position = torch.nonzero(target != IGNORE, as_tuple=True)
    logits = head(hidden[row, position])
    return cross_entropy(logits, target[row, position], reduction="none"), row


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token; prompts are read, never learned (C1)."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = core.model(input_ids=batch.ids).last_hidden_state
    nats, _ = token_nats(core.lm_head, hidden, batch.labels)
    loss = nats.mean()
    return loss, {"loss": float(loss.detach())}
