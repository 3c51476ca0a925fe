"""Importance of weights and pruning masks (SPEC D2). Pure functions.

The importance of a weight is |weight|^a * |gradient|^b * activation^c with the exponents of a `Mix`. As a product it
needs no common scale, and it includes the usual criteria: magnitude (a), Wanda (a = c; Sun et al., 2306.11695) and
first-order Taylor (a = b; Molchanov et al., 1906.10771).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

PARTS = ("attention", "feed_forward", "embeddings", "head")
GROUP = 4
"""Consecutive weights of a row, of which the 2:4 pattern keeps two (Mishra et al., 2104.08378)."""


class Mix(BaseModel):
    """Exponents of the importance: weight magnitude, mean absolute gradient, RMS of the weight's input."""

    model_config = ConfigDict(extra="forbid")
    magnitude: float = Field(1.0, ge=0)
    gradient: float = Field(0.0, ge=0)
    activation: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _not_all_zero(self) -> Mix:
        if self.magnitude + self.gradient + self.activation == 0:
            raise ValueError("all exponents of the mix are 0; give at least one of magnitude, gradient, activation")
        return self


def part_of(name: str) -> str | None:
    """The part to which a weight of a Llama or Qwen2 belongs; None for norms and biases, which are never pruned."""
    if name.endswith("embed_tokens.weight"):
        return "embeddings"
    if name.endswith("lm_head.weight"):
        return "head"
    if not name.endswith("_proj.weight"):
        return None
    return "attention" if ".self_attn." in name else "feed_forward"


def importance(weight: Tensor, mix: Mix, gradient: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """`[out, in]` from a weight `[out, in]`, its gradient `[out, in]` and the activation of its `columns` `[in]`.

    A missing factor counts as 1. A zero weight is less important than any other.
    """
    score = weight.abs().double() ** mix.magnitude
    if gradient is not None:
        score = score * gradient.abs().double() ** mix.gradient
    if columns is not None:
        score = score * columns.double() ** mix.activation
    return score.masked_fill(weight == 0, -1.0)


def least(scores: Tensor, share: float) -> Tensor:
    """True at the `share` (in [0, 1)) of lowest scores, rounded to whole weights; of equal scores at the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[: round(share * scores.numel())]] = True
    return mask.view(scores.shape)


def least_of_four(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of every four consecutive scores `[out, in]`; of equal scores at the first."""
    groups = scores.reshape(-1, GROUP)
    order = groups.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def scaled(parts: Mapping[str, float], weights: Mapping[str, int], overall: float) -> dict[str, float]:
    """The shares of `parts` scaled by a common factor, so that `overall` of all their `weights` are pruned.

    Raises `ValueError` if a part would lose all its weights, or if all shares are 0.
    """
    if not any(parts.values()):
        raise ValueError("the shares of all parts are 0; a grid needs a share above 0")
    now = sum(share * weights[part] for part, share in parts.items()) / sum(weights[part] for part in parts)
    shares = {part: share * overall / now for part, share in parts.items()}
    for part, share in shares.items():
        if share >= 1:
            raise ValueError(f"{overall:.0%} overall takes {share:.0%} of {part}")
    return shares


def score(quality: float, size: float) -> float:
    """Quality kept minus bytes kept, both as shares of the dense model's."""
    return quality - size


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (quality, size) points are Pareto-optimal: no other is at least as good in both and better in one."""
    return [
        not any(q >= quality and s <= size and (q, s) != (quality, size) for q, s in points) for quality, size in points
    ]
