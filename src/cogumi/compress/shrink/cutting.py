"""Choice of the layers, heads, neurons and channels to keep, and the smaller tensors (SPEC D3). Pure functions.

After Minitron (Muralidharan et al., 2407.14679): the parts of each kind are ranked once by their activations on
calibration tokens, and the strongest are kept in their order. Heads and neurons are ranked per layer, channels for the
whole model, because all layers share the residual stream.
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
"""The axes of each module's weight (rows, columns); a bias has the axis of the rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Importance of `layers` `[layers]`, `heads` `[layers, heads]`, `neurons` `[layers, feed_forward]` and `channels`
    `[hidden]`; comparable within a kind (and a layer) only. `power` is the mean square `[hidden]` of each norm's input
    channels, by the name of the norm's weight.
    """

    layers: Tensor
    heads: Tensor
    neurons: Tensor
    channels: Tensor
    power: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Kept:
    """Indices of the parts to keep, ascending; `heads`, `kv_heads` and `neurons` by layer of the original model.

    `heads` consists of groups of equal size, one for each of `kv_heads`. `head` is the width of a head. `gains` are
    factors on the weights of norms, by name.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]
    head: int
    gains: Mapping[str, float]

    def along(self, axis: str, layer: int) -> Tensor:
        """Indices to keep along a named axis of a tensor of that layer."""
        if axis == "query":
            return self._wide(self.heads[layer])
        if axis == "key":
            return self._wide(self.kv_heads[layer])
        return torch.tensor(self.neurons[layer] if axis == "feed_forward" else self.channels)

    def _wide(self, heads: tuple[int, ...]) -> Tensor:
        return (torch.tensor(heads)[:, None] * self.head + torch.arange(self.head)).flatten()


def smaller(shape: ModelShape, asked: Mapping[str, int]) -> ModelShape:
    """The shape with the `asked` sizes: `layers`, `feed_forward`, `heads`, `kv_heads`, `hidden`.

    If only one of `heads` and `kv_heads` is given, whole groups are removed: the number of query heads per key-value
    head does not change. The width of a head does not change. `RecipeError` for larger sizes and for sizes that cannot
    be combined.
    """
    for name, value in asked.items():
        if value > getattr(shape, name):
            raise RecipeError(f"{name}: {value} is more than the model's {getattr(shape, name)}; give a smaller number")
    group = shape.heads // shape.kv_heads
    heads = asked.get("heads", asked.get("kv_heads", shape.kv_heads) * group)
    if "kv_heads" not in asked and heads % group:
        raise RecipeError(
            f"heads: {heads} is not a multiple of the {group} query heads that share a key-value head here; "
            "give a multiple, or set kv_heads too"
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
    """Indices of the `count` largest of `[n]`, ascending; of equal values the first."""
    return tuple(sorted(torch.argsort(importance, descending=True, stable=True)[:count].tolist()))


def strongest_heads(importance: Tensor, shape: ModelShape, target: ModelShape) -> tuple[tuple[int, ...], ...]:
    """Query heads and key-value heads to keep in one layer, by the importances of its query heads `[heads]`.

    The groups with the largest sums are kept, and in each of them its strongest heads.
    """
    group, remaining = shape.heads // shape.kv_heads, target.heads // target.kv_heads
    grouped = importance.view(shape.kv_heads, group)
    kv_heads = strongest(grouped.sum(1), target.kv_heads)
    return tuple(k * group + i for k in kv_heads for i in strongest(grouped[k], remaining)), kv_heads


def choose(importance: Importance, shape: ModelShape, target: ModelShape) -> Kept:
    """The parts to keep when a model of `shape` is cut to `target`.

    A norm divides by the root mean square over all channels; its gain corrects for the removed ones.
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
