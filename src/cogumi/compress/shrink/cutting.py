"""Which layers, heads, neurons and channels of a model stay, and the smaller tensors (SPEC D3).

Pure maths on importances and tensors, after Minitron (Muralidharan et al., 2407.14679): each kind of part is ranked by
how strongly it acts on calibration tokens, all at once, and the strongest stay in their order. Heads are told by layer,
neurons by layer, channels for the whole model: the residual stream is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cogumi.core.errors import RecipeError
from cogumi.core.shapes import ModelShape

BLOCK = 32
"""Values in a quantization block: widths stay multiples of it."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("", "hidden"),
    "input_layernorm": ("hidden",),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "post_attention_layernorm": ("hidden",),
    "gate_proj": ("feed_forward", "hidden"),
    "up_proj": ("feed_forward", "hidden"),
    "down_proj": ("hidden", "feed_forward"),
    "norm": ("hidden",),
    "lm_head": ("", "hidden"),
}
"""What the rows and columns of each module's weight belong to; a bias has the rows' axis."""


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """How much each part matters: `layers` `[layers]`, `heads` `[layers, heads]`, `neurons` `[layers, feed_forward]`,
    `channels` `[hidden]`; comparable within a kind (and a layer) only. `power` is the mean square of each channel
    `[hidden]` where it enters a norm, by the name of the norm's weight.
    """

    layers: Tensor
    heads: Tensor
    neurons: Tensor
    channels: Tensor
    power: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """Indices of what stays, ascending; `heads`, `kv_heads` and `neurons` by layer of the whole model.

    `heads` lie in groups of equally many, one for each of `kv_heads`. `head` is the width of one. `gains` are factors
    on norms, by the name of their weight.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]
    head: int
    gains: Mapping[str, float]

    def along(self, axis: str, layer: int) -> Tensor:
        """Indices that stay along a named axis of a tensor of that layer."""
        if axis == "query":
            return self._wide(self.heads[layer])
        if axis == "key":
            return self._wide(self.kv_heads[layer])
        return torch.tensor(self.neurons[layer] if axis == "feed_forward" else self.channels)

    def _wide(self, heads: tuple[int, ...]) -> Tensor:
        return (torch.tensor(heads)[:, None] * self.head + torch.arange(self.head)).flatten()


def smaller(shape: ModelShape, asked: Mapping[str, int]) -> ModelShape:
    """The shape with the `asked` figures: `layers`, `feed_forward`, `heads`, `kv_heads`, `hidden`.

    Of `heads` and `kv_heads` one alone means whole groups: as many query heads share a key-value head as before. The
    width of a head stays. `RecipeError` for growth and for figures that do not go together.
    """
    for name, value in asked.items():
        if value > getattr(shape, name):
            raise RecipeError(
                f"{name}: {value} is more than the model's {getattr(shape, name)}; shrinking only cuts, ask for less"
            )
    group = shape.heads // shape.kv_heads
    heads = asked.get("heads", asked.get("kv_heads", shape.kv_heads) * group)
    if "kv_heads" not in asked and heads % group:
        raise RecipeError(
            f"heads: {heads} is not a multiple of the {group} query heads that share a key-value head here; "
            "ask for one, or give kv_heads too"
        )
    kv_heads = asked.get("kv_heads", heads // group)
    if heads % kv_heads or heads // kv_heads > group:
        raise RecipeError(
            f"{heads} heads on {kv_heads} kv_heads cannot be cut from {shape.heads} on {shape.kv_heads}; "
            f"each key-value head keeps the same number of query heads, at most {group}"
        )
    result = replace(
        shape,
        layers=asked.get("layers", shape.layers),
        feed_forward=asked.get("feed_forward", shape.feed_forward),
        hidden=asked.get("hidden", shape.hidden),
        heads=heads,
        kv_heads=kv_heads,
    )
    for name, width in (("hidden", result.hidden), ("feed_forward", result.feed_forward), ("heads", result.query)):
        if width % BLOCK and width != getattr(shape, "query" if name == "heads" else name):
            raise RecipeError(f"{name}: a width of {width} is not a multiple of {BLOCK} and could not be quantized")
    if shape.kind == "qwen2" and result.query != result.hidden:
        raise RecipeError(
            f"llama.cpp runs a qwen2 only with as many channels as its heads are wide; {result.heads} heads of "
            f"{result.head} are {result.query} wide, hidden is {result.hidden}: cut heads and hidden alike"
        )
    return result


def strongest(importance: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest of `[n]`, ascending; of equals the first."""
    return tuple(sorted(torch.argsort(importance, descending=True, stable=True)[:count].tolist()))


def strongest_heads(importance: Tensor, shape: ModelShape, target: ModelShape) -> tuple[tuple[int, ...], ...]:
    """Query heads and key-value heads of one layer, by the importances of its query heads `[heads]`.

    First the groups, by their heads' sum; in each of those its strongest heads.
    """
    group, stay = shape.heads // shape.kv_heads, target.heads // target.kv_heads
    grouped = importance.view(shape.kv_heads, group)
    kv_heads = strongest(grouped.sum(1), target.kv_heads)
    return tuple(k * group + i for k in kv_heads for i in strongest(grouped[k], stay)), kv_heads


def choose(importance: Importance, shape: ModelShape, target: ModelShape) -> Kept:
    """What stays of a model of this shape when it becomes one of the target's.

    A norm divides by the root mean square of the channels it is given; its gain makes up for those that are missing.
    """
    channels = strongest(importance.channels, target.hidden)
    heads = [strongest_heads(layer, shape, target) for layer in importance.heads]
    return Kept(
        strongest(importance.layers, target.layers),
        tuple(queries for queries, _ in heads),
        tuple(keys for _, keys in heads),
        tuple(strongest(layer, target.feed_forward) for layer in importance.neurons),
        channels,
        shape.head,
        {name: math.sqrt(p[list(channels)].mean() / p.mean()) for name, p in importance.power.items()},
    )


def cut(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The tensors of the smaller model, named as in a model folder."""
    found = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        layer = int(match[1]) if match else 0
        if match and layer not in kept.layers:
            continue
        new = f"model.layers.{kept.layers.index(layer)}.{match[2]}" if match else name
        for dim, axis in enumerate(_AXES[name.split(".")[-2]][: tensor.ndim]):
            if axis:
                tensor = tensor.index_select(dim, kept.along(axis, layer))
        found[new] = tensor.contiguous() * kept.gains.get(name, 1.0)
    return found
