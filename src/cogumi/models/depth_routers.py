"""Mixture of Depths: tokens skip decoder layers, as decided by small routers (SPEC C7).

Raposo et al., arXiv 2404.02258; for trained models: Router-Tuning, arXiv 2410.13184. Consecutive layers form a span,
with one decision per token for the whole span. A token that skips a span keeps its hidden state and adds no keys and
values to the cache of the span's layers. Training and the engine use the same code.
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
"""depth(first layer of a span, its input [rows, tokens, width]) -> tokens that use the span, bool [rows, tokens]."""


def spans_of(layers: Sequence[int], count: int) -> Spans:
    """Runs of consecutive `layers` (from 0) of a model with `count` layers.

    `TrainingError` for a layer that does not exist, and for none or more than half of the layers.
    """
    missing = [layer for layer in layers if not 0 <= layer < count]
    if missing:
        raise TrainingError(f"layer {missing[0]} does not exist: this model has layers 0 to {count - 1}")
    if not layers or 2 * len(set(layers)) > count:
        raise TrainingError(f"{len(set(layers))} of {count} layers are to be skipped; name 1 to {count // 2}")
    chosen = sorted(set(layers))
    starts = [i for i, layer in enumerate(chosen) if layer - 1 not in chosen]
    return tuple(tuple(chosen[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True))


class Routers(nn.Module):
    """One net per span, width -> 128 -> 32 -> 2: scores of "hard" and "easy" for each token at the span's input.

    A token skips the span if the log-odds of easy exceed `bar`; a token with a NaN score uses the span.
    """

    def __init__(self, spans: Spans, width: int, bar: float = 0.0) -> None:
        super().__init__()
        self.spans, self.width, self.bar = spans, width, bar
        sizes = (width, *_HIDDEN, 2)
        nets = {span[0]: [nn.Linear(a, b) for a, b in pairwise(sizes)] for span in spans}
        self.nets = nn.ModuleDict({str(first): nn.ModuleList(net) for first, net in nets.items()})
        # module look-ups are slow at every token
        self._weights = {first: [(layer.weight, layer.bias) for layer in net] for first, net in nets.items()}

    def easy(self, first: int, hidden: Tensor) -> Tensor:
        """Log-odds that a token is easy: [rows, tokens, width] -> [rows, tokens]."""
        below, middle, last = self._weights[first]
        scores = linear(linear(linear(hidden, *below).relu(), *middle).relu(), *last)
        return scores[..., 1] - scores[..., 0]

    def takes(self, first: int, hidden: Tensor) -> Tensor:
        """`Depth` of these routers."""
        return ~(self.easy(first, hidden) > self.bar)

    def save(self, path: Path, base: Path) -> None:
        """Write the routers with the hash of their model folder `base`."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        layers = [layer for span in self.spans for layer in span]
        about = {"layers": layers, "base_sha256": sha256(base / "model.safetensors"), "bar": self.bar}
        save_tensors(tensors, path, {"depth": json.dumps(about)})  # one key, because their order is not deterministic

    @classmethod
    def load(cls, path: Path, base: Path) -> Routers:
        """Routers of the model folder `base`. `BundleError` for another model's routers, or a file without routers."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {})["depth"])
            layers, base_sha256, bar = about["layers"], about["base_sha256"], float(about["bar"])
            config = json.loads((base / "config.json").read_text("utf-8"))
            count, width = config["num_hidden_layers"], config["hidden_size"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{path} holds no depth routers for {base} ({error}); run the depth step again"
            ) from error
        if base_sha256 != sha256(base / "model.safetensors"):
            raise BundleError(f"{path} was trained on another model than {base}; run the depth step on this one")
        try:
            routers = cls(spans_of(layers, count), width, bar)
            routers.load_state_dict(tensors)
        except (TrainingError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise BundleError(f"{path} does not fit {base} ({reason}); run the depth step again") from error
        if math.isnan(bar) or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise BundleError(f"{path} holds weights that are NaN or infinite; run the depth step again")
        return routers


class SpanCache(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Key-value cache of one layer of a span: entries of the tokens that used it, [rows, heads, columns, head width].

    `seen` counts all tokens, so that the model's mask has the right length. If some rows of a batch skip and others do
    not, rows have gaps: `held` [rows, columns] is True at entries, None without gaps. `adding` are the rows of the next
    `update`, None for all.
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
        """Number of tokens, including those that skipped the layer."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for layers without a router."""
        return self.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns for the rows in `adding`; returns all columns of these rows."""
        rows = self.adding
        if rows is None:
            super().update(key_states, value_states)
            return self.keys, self.values
        assert self.held is not None  # rows outside `adding` get a gap
        size = (len(self.held), *key_states.shape[1:])
        super().update(
            key_states.new_zeros(size).index_copy(0, rows, key_states),
            value_states.new_zeros(size).index_copy(0, rows, value_states),
        )
        return self.keys[rows], self.values[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch."""
        if self.columns:
            self.keys, self.values = self.keys[indices], self.values[indices]
        if self.held is not None:
            self.held = self.held[indices]


class Span(nn.Module):
    """Consecutive decoder layers called as one module, on the tokens that use them."""

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
        """Hidden states [rows, tokens, width] after the span; `attention_mask` as in `transformers` for sdpa."""
        assert position_embeddings is not None
        taken = self.depth(self.first, hidden)
        if attention_mask is not None:  # padding is masked from itself too
            taken = taken & attention_mask[:, 0, :, -taken.shape[1] :].diagonal(dim1=1, dim2=2)
        at = range(self.first, self.first + len(self.layers))
        caches = [cast(SpanCache, past_key_values.layers[i]) for i in at] if past_key_values is not None else []
        for cache in caches:
            cache.seen += taken.shape[1]
        if not taken.any():
            return hidden
        packing = Packing(taken)
        mask = packing.mask(caches)
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
    """Packs the tokens of a batch that use a span (`taken` [rows, tokens]) into [rows with any, `width`, ...],
    right-aligned. If all tokens use it, nothing is moved.
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
        """[rows, tokens, n] -> [rows with any, width, n], padded with zeros on the left."""
        if self.whole:
            return x
        packed = x.new_zeros(*self._here.shape, x.shape[-1])
        packed[self._here] = x[self.taken]
        return packed

    def unpack(self, packed: Tensor, x: Tensor) -> Tensor:
        """The inverse of `pack`; tokens that were not packed keep their value in `x`."""
        if self.whole:
            return packed
        x = x.clone()
        x[self.taken] = packed[self._here]
        return x

    def mask(self, caches: Sequence[SpanCache]) -> Tensor | None:
        """Attention mask of packed tokens [rows with any, 1, width, columns], None for plain causal attention.

        Updates `held` and `adding` of the caches.
        """
        before = caches[0].columns if caches else 0
        held = caches[0].held if caches else None
        size = self.taken.shape[0]
        if held is not None or not (self.whole or bool(self.filled.all())):
            held = self.taken.new_ones(size, before) if held is None else held
            held = torch.cat([held, self.taken.new_ones(size, self.width) if self.whole else self.filled], dim=1)
            held = None if bool(held.all()) else held
        for cache in caches:
            cache.held, cache.adding = held, self.rows
        if held is None and (self.width == 1 or not before):
            return None
        column = torch.arange(before + self.width, device=self.taken.device)
        own = before + torch.arange(self.width, device=self.taken.device)[:, None]
        if held is None:
            return (column <= own)[None, None]
        seen = held if self.rows is None else held[self.rows]
        return ((column <= own) & seen[:, None] | (column == own))[:, None]  # a gap attends to itself, to avoid NaN


def install(decoder: Any, depth: Depth, spans: Spans | None = None) -> None:
    """Replace layers of a decoder by `Span` modules; `spans` None: one span per layer."""
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
    """`install` spans inside the `with` block."""
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
        layers += [SpanCache() for _ in module.layers] if isinstance(module, Span) else [DynamicLayer()]
    return Cache(layers=layers)
