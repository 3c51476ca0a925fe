"""Exact match of greedy answers, shared by training and evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def language_model(model: Any) -> Any:
    """The causal language model of a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def exact(logits: Tensor, targets: Tensor, row: Tensor, rows: int) -> Tensor:
    """Whether greedy decoding reproduces each answer exactly: all its tokens have the largest logit; `[rows]`.

    `logits` `[n, vocabulary]`, `targets` `[n]` and row numbers `row` `[n]` of all answer tokens.
    """
    wrong = (logits.argmax(-1) != targets).float()
    return torch.zeros(rows, device=logits.device).index_add(0, row, wrong) == 0
