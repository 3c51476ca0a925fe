"""Importance of a model's parts, from activations on calibration rows (SPEC D3; Minitron, 2407.14679, 2408.11796).

One pass measures heads (mean norm of a head's input to the output projection), neurons (mean absolute input of the down
projection) and channels (mean absolute output of the norms, summed over all norms). The importance of a layer is the
loss without it, as in the second paper. That needs a pass per layer, but unlike block influence (ShortGPT, 2403.03853)
it measures the loss itself.
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
    """Forward hooks that sum activation statistics over the tokens of all batches, by name."""

    def __init__(self, model: Any, shape: ModelShape) -> None:
        self.sums: dict[str, Tensor] = {}
        self.mask = torch.empty(0)
        self.norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
        self.handles = []
        for name in self.norms:
            norm = model.get_submodule(name)
            self.handles.append(norm.register_forward_pre_hook(self._before(f"{name}.weight", torch.square)))
            self.handles.append(norm.register_forward_hook(self._after))
        for i, layer in enumerate(model.model.layers):
            self.handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._before(f"neurons/{i}", torch.abs)))
            norms = self._before(f"heads/{i}", lambda tokens: tokens.view(len(tokens), -1, shape.head).norm(dim=-1))
            self.handles.append(layer.self_attn.o_proj.register_forward_pre_hook(norms))

    def _before(self, name: str, figure: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: self._add(name, figure(inputs[0][self.mask]))

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._add("channels", output[self.mask].abs())

    def _add(self, name: str, figures: Tensor) -> None:
        """Sum `[tokens, ...]` over tokens, in double precision."""
        self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + figures.double().sum(0).cpu()

    def forward(self, model: Any, batch: Batch) -> None:
        """Run the model on a batch; tokens after a row's last label are padding."""
        self.mask = (batch.labels >= 0).flip(1).cumsum(1).flip(1) > 0
        model.model(input_ids=batch.ids, use_cache=False)


@contextmanager
def without(model: Any, layer: int) -> Iterator[None]:
    """Remove one layer of the model inside the `with` block."""
    whole = model.model.layers
    model.model.layers = nn.ModuleList(part for i, part in enumerate(whole) if i != layer)
    try:
        yield
    finally:
        model.model.layers = whole


def measure(
    model: Any, shape: ModelShape, rows: Sequence[Row], layers: bool, progress: Callable[[int], None]
) -> Importance:
    """The importance of every part on calibration rows; of `layers` only on request, because each needs a pass.

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
