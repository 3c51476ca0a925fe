"""The draft model: one backbone with two heads, next token and difficulty (SPEC C5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogumi.models.folders import save_tensors


class DraftModel(nn.Module):
    """A causal language model with a logit for "the question is easy" on the hidden state of the last prompt token."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.lm = language_model
        self.difficulty = nn.Linear(language_model.config.hidden_size, 1)

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states after the final norm: `[rows, positions]` -> `[rows, positions, width]`."""
        states: Tensor = self.lm.model(input_ids=ids).last_hidden_state
        return states

    def easy_logit(self, hidden: Tensor, last: Tensor) -> Tensor:
        """`[rows]` logits from the hidden state at each row's position `last`."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self.difficulty(hidden[rows, last]).squeeze(-1)  # type: ignore[no-any-return]

    def save_difficulty(self, path: Path) -> None:
        """Write the difficulty head as safetensors {weight [width], bias [1]}, which the cascade reads with numpy."""
        weight = self.difficulty.weight.detach()[0].contiguous()
        save_tensors({"weight": weight, "bias": self.difficulty.bias.detach().contiguous()}, path, {})
