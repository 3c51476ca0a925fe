"""How strongly the parts of a model act on calibration tokens (SPEC D3; Minitron, 2407.14679 and 2408.11796).

One pass tells heads (mean length of what a head hands to the output projection), neurons (mean absolute value before
the down projection) and channels (mean absolute value after a norm, summed over all norms). A layer matters by the loss
that leaving it out costs, as in the second paper: it needs a pass for each layer, but unlike block influence (ShortGPT,
2403.03853) it is the very thing that is to stay low.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cogumi.compress.shrink.cutting import Importance
from cogumi.core.shapes import ModelShape
from cogumi.models.tokenization import Row
from cogumi.train.batches import Batch, collate
from cogumi.train.validation import applied, judge_answers, passes


class _Meter:
    """Hooks that add up, by name, what the tokens of a batch show."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self.sums: dict[str, Tensor] = {}
        self.read = torch.empty(0)
        self.norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
        self.handles = []
        for name in self.norms:
            norm = model.get_submodule(name)
            self.handles.append(norm.register_forward_pre_hook(self._before(f"{name}.weight", torch.square)))
            self.handles.append(norm.register_forward_hook(self._after))
        for i, layer in enumerate(model.model.layers):
            self.handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._before(f"neurons/{i}", torch.abs)))
            lengths = self._before(f"heads/{i}", lambda read: read.view(len(read), -1, shape.head).norm(dim=-1))
            self.handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lengths))

    def _before(self, name: str, figure: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: self._add(name, figure(inputs[0][self.read]))

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._add("channels", output[self.read].abs())

    def _add(self, name: str, figures: Tensor) -> None:
        """Sum `[tokens, ...]` over tokens, in double precision."""
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + figures.double().sum(0).cpu()

    def forward(self, model: Any, batch: Batch) -> None:
        """Read a batch; a row's tokens end with its last label."""
        self.read = (batch.labels >= 0).flip(1).cumsum(1).flip(1) > 0
        model.model(input_ids=batch.ids, use_cache=False)


@contextmanager
def without(model: Any, layer: int) -> Iterator[None]:
    """The model with one layer left out."""
    whole = model.model.layers
    model.model.layers = nn.ModuleList(part for i, part in enumerate(whole) if i != layer)
    try:
        yield
    finally:
        model.model.layers = whole


def measure(
    model: Any, shape: ModelShape, rows: Sequence[Row], layers: bool, progress: Callable[[int], None]
) -> Importance:
    """The importance of every part on calibration rows; of layers only if asked, as each takes a pass of its own.

    `progress(done)` counts passes.
    """
    meter = _Meter(model, shape)
    for index in passes(rows):
        applied(model)(meter.forward, collate(rows, index))
    for handle in meter.handles:
        handle.remove()
    progress(1)
    losses = torch.zeros(shape.layers, dtype=torch.float64)
    for i in range(shape.layers if layers else 0):
        with without(model, i):
            losses[i] = judge_answers(applied(model), rows)["loss"]
        progress(i + 2)
    tokens = sum(row.size for row in rows)
    mean = {name: values / tokens for name, values in meter.sums.items()}
    return Importance(
        losses,
        torch.stack([mean[f"heads/{i}"] for i in range(shape.layers)]),
        torch.stack([mean[f"neurons/{i}"] for i in range(shape.layers)]),
        mean["channels"],
        {f"{name}.weight": mean[f"{name}.weight"] for name in meter.norms},
    )
