"""Mixed precision: sensitivity of each linear layer to rounding, and the bits it gets (SPEC D4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cogumi.compress.gguf.layout import Llama
from cogumi.core.errors import RecipeError
from cogumi.core.stage import Context
from cogumi.models.tokenization import Row
from cogumi.train.batches import collate
from cogumi.train.losses import answer_logits, divergence
from cogumi.train.validation import passes

Level: TypeAlias = Literal["finer", "middle", "coarser"]

BITS: Mapping[Level, int] = {"finer": 6, "middle": 4, "coarser": 3}
"""Bits of a weight at each level."""

GGUF_TYPES: Mapping[Level, tuple[str, str]] = {"finer": ("q6_k", "q8_0"), "coarser": ("q3_k", "q4_0")}
"""The nearest types of llama.cpp, and the fallback if rows do not fill blocks of 256."""


class Setting(BaseModel):
    """`group`: weights of a row that share a scale and a zero point. The most sensitive share `finer` of all weights
    is rounded to more than four bits in groups of at most 32, the least sensitive share `coarser` to fewer.
    """

    model_config = ConfigDict(extra="forbid")
    group: int = Field(128, ge=2)
    finer: float = Field(0.1, ge=0, le=1)
    coarser: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _shares_at_most_one(self) -> Setting:
        if self.finer + self.coarser > 1:
            raise ValueError(f"finer and coarser are {self.finer} and {self.coarser}; together they are at most 1")
        return self

    def group_of(self, level: Level) -> int:
        """Weights that share a scale at a level."""
        return math.gcd(self.group, 32) if level == "finer" else self.group


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers to round, by name: those of the transformer layers, without the head, which may be tied."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def check_group(model: nn.Module, group: int) -> None:
    """`RecipeError` if the group size does not divide the row length of every linear layer."""
    widths = {layer.in_features: name for name, layer in linears(model).items()}
    for width, name in widths.items():
        if width % group:
            raise RecipeError(
                f"groups of {group} weights do not divide the {width} inputs of {name}; "
                f"set a group that divides {math.gcd(*widths)}"
            )


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Weights `[out, in]` rounded to the nearest of `2 ** bits` evenly spaced values from minimum to maximum of each
    group; zero is always one of them.
    """
    groups: Tensor = weight.reshape(len(weight), -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    step = ((high - low) / top).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = (-low / step).round()
    places = ((groups / step).round() + zero).clamp(0, top)
    nearest: Tensor = (places - zero) * step
    return nearest.reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Effect of rounding one linear layer on answers, in nats per token: Kullback-Leibler `divergence` from the
    original model, and `rise` of the loss. Rounding may lower the loss by chance, but always diverges.
    """

    divergence: float
    rise: float


@torch.no_grad()
def sensitivities(model: nn.Module, rows: Sequence[Row], group: int, context: Context) -> dict[str, Sensitivity]:
    """The sensitivity of each linear layer to four bits, on the answers of `rows`. The model is not changed."""
    layers = linears(model)
    sums = {name: [0.0, 0.0] for name in layers}
    batches = [collate(rows, index).to(next(model.parameters()).device) for index in passes(rows)]
    for b, batch in enumerate(batches):
        before, target, _ = answer_logits(model, batch)
        nats = float(cross_entropy(before, target, reduction="sum"))
        for k, (name, layer) in enumerate(layers.items()):
            kept = layer.weight.data
            layer.weight.data = rounded(kept, BITS["middle"], group)
            after = answer_logits(model, batch)[0]
            layer.weight.data = kept
            sums[name][0] += float(divergence(after, before)) * len(target)
            sums[name][1] += float(cross_entropy(after, target, reduction="sum")) - nats
            context.progress(b * len(layers) + k + 1, len(batches) * len(layers), {})
    tokens = sum(row.weight for row in rows)
    return {name: Sensitivity(diverged / tokens, risen / tokens) for name, (diverged, risen) in sums.items()}


def levels(costs: Mapping[str, float], sizes: Mapping[str, int], setting: Setting) -> dict[str, Level]:
    """The level of each linear layer. In the order of `costs` (nats) per weight, the most costly layers get the level
    finer up to its share of all weights, the least costly ones the level coarser.
    """
    order = sorted(costs, key=lambda name: (-costs[name] / sizes[name], name))
    level: dict[str, Level] = dict.fromkeys(costs, "middle")
    ends: tuple[tuple[Level, list[str], float], ...] = (
        ("finer", order, setting.finer),
        ("coarser", order[::-1], setting.coarser),
    )
    for name, names, share in ends:
        budget = share * sum(sizes.values())
        for linear in names:
            budget -= sizes[linear]
            if budget < 0:
                break
            level[linear] = name
    return level


def bits_per_weight(level: Mapping[str, Level], sizes: Mapping[str, int], setting: Setting) -> float:
    """Mean bits per weight, including the scale (16 bits) and the zero point (bits of a weight) of each group."""
    bits = {kind: BITS[kind] + (16 + BITS[kind]) / setting.group_of(kind) for kind in BITS}
    return sum(size * bits[level[name]] for name, size in sizes.items()) / sum(sizes.values())


def gguf_types(folder: Path, level: Mapping[str, Level]) -> dict[str, str]:
    """GGUF tensor name -> type, for the linear layers of a model folder that are not at the middle level."""
    types = {}
    for tensor in Llama.load(folder).tensors():
        kind = level.get(tensor.source.removesuffix(".weight"), "middle")
        if tensor.source.endswith(".weight") and kind in GGUF_TYPES:
            types[tensor.name] = GGUF_TYPES[kind][tensor.shape[-1] % 256 > 0]
    return types


def config_groups(level: Mapping[str, Level], setting: Setting) -> dict[str, Any]:
    """The mixture as llm-compressor's `config_groups`."""
    return {
        kind: {
            "targets": sorted(name for name in level if level[name] == kind),
            "weights": {
                "num_bits": BITS[kind],
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": setting.group_of(kind),
            },
        }
        for kind in sorted(set(level.values()))
    }
