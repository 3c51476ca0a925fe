"""Mixture of Depths: tokens that skip decoder layers, and the small routers that let them (SPEC C7).

Raposo et al., arXiv 2404.02258; on a trained model: Router-Tuning, arXiv 2410.13184. Layers are skipped by spans: runs
of neighbouring layers that a token takes or skips as one, so that one decision serves them all. A token that skips a
span keeps its hidden state, computes nothing there and leaves no keys and values for later tokens. Training and the
engine run this same code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from cogumi.core.errors import BundleError, TrainingError
from cogumi.core.files import sha256
from cogumi.models.folders import save_tensors

FILE = "depth.safetensors"
_HIDDEN = (128, 32)

Spans: TypeAlias = tuple[tuple[int, ...], ...]
Depth: TypeAlias = Callable[[int, Tensor], Tensor]
"""From a span's first layer and its input [rows, tokens, width] to which tokens take it: booleans [rows, tokens]."""


def spans_of(layers: Sequence[int], count: int) -> Spans:
    """Runs of neighbours among the layers (from 0) of a model with `count`. `TrainingError` if they cannot skip."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise TrainingError(f"layer {wrong[0]} does not exist: this model has layers 0 to {count - 1}")
    if not layers or 2 * len(set(layers)) > count:
        raise TrainingError(f"{len(set(layers))} of {count} layers may skip; name 1 to {count // 2}")
    chosen = sorted(set(layers))
    starts = [i for i, layer in enumerate(chosen) if layer - 1 not in chosen]
    return tuple(tuple(chosen[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True))


class Routers(nn.Module):
    """One net per span, width -> 128 -> 32 -> 2: scores of "hard" and "easy" for each token entering the span.

    A token skips where the log-odds of easy exceed `bar`; one whose score is no number takes the layers.
    """

    def __init__(self, spans: Spans, width: int, bar: float = 0.0) -> None:
        super().__init__()
        self.spans, self.width, self.bar = spans, width, bar
        sizes = (width, *_HIDDEN, 2)
        nets = {span[0]: [nn.Linear(a, b) for a, b in pairwise(sizes)] for span in spans}
        self.nets = nn.ModuleDict({str(first): nn.ModuleList(net) for first, net in nets.items()})
        self._weights = {first: [(layer.weight, layer.bias) for layer in net] for first, net in nets.items()}  # quick

    def easy(self, first: int, hidden: Tensor) -> Tensor:
        """Log-odds that a token is easy: [rows, tokens, width] -> [rows, tokens]."""
        below, middle, last = self._weights[first]
        scores = linear(linear(linear(hidden, *below).relu(), *middle).relu(), *last)
        return scores[..., 1] - scores[..., 0]

    def takes(self, first: int, hidden: Tensor) -> Tensor:
        """`Depth` of these routers."""
        return ~(self.easy(first, hidden) > self.bar)

    def save(self, path: Path, base: Path) -> None:
        """Write the routers with what they belong to: the model folder `base`."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        layers = [layer for span in self.spans for layer in span]
        about = {"layers": layers, "base_sha256": sha256(base / "model.safetensors"), "bar": self.bar}
        save_tensors(tensors, path, {"depth": json.dumps(about)})  # one key: safetensors writes several in any order

    @classmethod
    def load(cls, path: Path, base: Path) -> Routers:
        """Routers of the model folder `base`. `BundleError` if they are another model's, or no routers at all."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {})["depth"])
            layers, belongs, bar = about["layers"], about["base_sha256"], float(about["bar"])
            config = json.loads((base / "config.json").read_text("utf-8"))
            count, width = config["num_hidden_layers"], config["hidden_size"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} holds no depth routers for {base} ({error}); run the depth step again"
            ) from error
        if belongs != sha256(base / "model.safetensors"):
            raise BundleError(f"{path} was trained on another model than {base}; run the depth step on this one")
        try:
            routers = cls(spans_of(layers, count), width, bar)
            routers.load_state_dict(tensors)
        except (TrainingError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise BundleError(f"{path} does not fit {base} ({reason}); run the depth step again") from error
        if math.isnan(bar) or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise BundleError(f"{path} holds weights that are no numbers; run the depth step again")
        return routers


class Entries(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Keys and values left in one layer by the tokens that took it: [rows, heads, columns, head width].

    `seen` counts all tokens that came by, so that the model's own mask keeps its length. Rows of a batch that skip
    while others do not have gaps: `held` [rows, columns] says where an entry is, None that there is no gap. `adding`
    are the rows that the next `update` is about, None means all.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.held: Tensor | None = None
        self.adding: Tensor | None = None

    @property
    def columns(self) -> int:
        """Entries and gaps of every row."""
        return int(self.keys.shape[-2]) if self.keys is not None else 0

    def get_seq_length(self) -> int:
        """Tokens that came by."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the model makes for layers without a router."""
        return self.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns for the rows in `adding`; returns all columns of these rows."""
        rows = self.adding
        if rows is None:
            super().update(key_states, value_states)
            return self.keys, self.values
        assert self.held is not None  # a row that adds nothing gets a gap
        size = (len(self.held), *key_states.shape[1:])
        super().update(
            key_states.new_zeros(size).index_copy(0, rows, key_states),
            value_states.new_zeros(size).index_copy(0, rows, value_states),
        )
        return self.keys[rows], self.values[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.columns:
            self.keys, self.values = self.keys[indices], self.values[indices]
        if self.held is not None:
            self.held = self.held[indices]


class Span(nn.Module):
    """Neighbouring decoder layers called as one, on the tokens that take them."""

    def __init__(self, first: int, layers: Sequence[nn.Module], depth: Depth) -> None:
        super().__init__()
        self.first, self.layers, self.depth = first, nn.ModuleList(layers), depth

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """Hidden states [rows, tokens, width] after the span; `attention_mask` as `transformers` makes it for sdpa."""
        assert position_embeddings is not None
        taken = self.depth(self.first, hidden)
        if attention_mask is not None:  # a padded position does not even see itself
            taken = taken & attention_mask[:, 0, :, -taken.shape[1] :].diagonal(dim1=1, dim2=2)
        at = range(self.first, self.first + len(self.layers))
        entries = [cast(Entries, past_key_values.layers[i]) for i in at] if past_key_values is not None else []
        for entry in entries:
            entry.seen += taken.shape[1]
        if not taken.any():
            return hidden
        packing = Packing(taken)
        mask = packing.mask(entries)
        cos, sin = (packing.pack(x.expand(*taken.shape, -1)) for x in position_embeddings)
        packed = packing.pack(hidden)
        for layer in self.layers:
            packed = layer(
                packed,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=past_key_values,
                **rest,
            )
        return packing.unpack(packed, hidden)


class Packing:
    """The tokens of a batch that take a span, moved together: [rows with any, `width`, ...], the last on the right.

    Made of `taken` [rows, tokens]. Where every token is taken, and in a single stream, nothing is moved.
    """

    def __init__(self, taken: Tensor) -> None:
        self.taken = taken
        self.whole = bool(taken.all())
        self.rows: Tensor | None = None
        if self.whole:
            self.width = taken.shape[1]
            return
        count = taken.sum(1)
        self.width = int(count.max())
        if int(count.min()) == 0:
            self.rows = count.nonzero().flatten()
        self.filled = torch.arange(self.width, device=taken.device) >= self.width - count[:, None]
        self._here = self.filled if self.rows is None else self.filled[self.rows]

    def pack(self, x: Tensor) -> Tensor:
        """[rows, tokens, n] -> [rows with any, width, n]; zeros where a row has fewer tokens than the widest."""
        if self.whole:
            return x
        packed = x.new_zeros(*self._here.shape, x.shape[-1])
        packed[self._here] = x[self.taken]
        return packed

    def unpack(self, packed: Tensor, x: Tensor) -> Tensor:
        """The inverse of `pack`; what was not taken stays as it is in `x`."""
        if self.whole:
            return packed
        x = x.clone()
        x[self.taken] = packed[self._here]
        return x

    def mask(self, entries: Sequence[Entries]) -> Tensor | None:
        """What packed tokens see [rows with any, 1, width, columns], None: all before them. Tells the entries."""
        before = entries[0].columns if entries else 0
        held = entries[0].held if entries else None
        size = self.taken.shape[0]
        if held is not None or not (self.whole or bool(self.filled.all())):
            held = self.taken.new_ones(size, before) if held is None else held
            held = torch.cat([held, self.taken.new_ones(size, self.width) if self.whole else self.filled], dim=1)
            held = None if bool(held.all()) else held
        for entry in entries:
            entry.held, entry.adding = held, self.rows
        if held is None and (self.width == 1 or not before):
            return None
        column = torch.arange(before + self.width, device=self.taken.device)
        own = before + torch.arange(self.width, device=self.taken.device)[:, None]
        if held is None:
            return (column <= own)[None, None]
        seen = held if self.rows is None else held[self.rows]
        return ((column <= own) & seen[:, None] | (column == own))[:, None]  # a gap sees itself: nothing becomes NaN


def install(decoder: Any, depth: Depth, spans: Spans | None = None) -> None:
    """Let a decoder's tokens skip these spans from now on; None: each layer by itself."""
    layers = list(decoder.layers)
    first = {span[0]: span for span in spans} if spans is not None else {i: (i,) for i in range(len(layers))}
    later = {i for span in first.values() for i in span[1:]}
    decoder.layers = nn.ModuleList(
        Span(i, [layers[k] for k in first[i]], depth) if i in first else layer
        for i, layer in enumerate(layers)
        if i not in later
    )


@contextmanager
def skipping(decoder: Any, depth: Depth, spans: Spans) -> Iterator[None]:
    """The decoder with `install`, and afterwards without."""
    whole = decoder.layers
    install(decoder, depth, spans)
    try:
        yield
    finally:
        decoder.layers = whole


def new_cache(decoder: Any) -> Cache:
    """An empty key-value cache for a decoder, with or without spans."""
    layers: list[Any] = []
    for module in decoder.layers:
        layers += [Entries() for _ in module.layers] if isinstance(module, Span) else [DynamicLayer()]
    return Cache(layers=layers)
