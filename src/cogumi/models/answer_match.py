"""What training and measuring both ask of a model about answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def language_model(model: Any) -> Any:
    """The causal language model itself, under an adapter or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def exact(logits: Tensor, targets: Tensor, row: Tensor, rows: int) -> Tensor:
    """Whether greedy decoding gives an answer word for word, that is: each of its tokens is the likeliest; `[rows]`.

    `logits` `[n, vocabulary]` and `targets` `[n]` of all answer tokens, `row` `[n]` whose answer each is in.
    """
    wrong = (logits.argmax(-1) != targets).float()
    return torch.zeros(rows, device=logits.device).index_add(0, row, wrong) == 0
