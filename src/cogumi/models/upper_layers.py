"""Parts of a decoder: its first layers without the final norm, or its last layers fed with hidden states (SPEC M5)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.shapes import find_shape
from cogumi.models.answer_match import language_model


def layers_below(folder: Path, upper: int) -> int:
    """Number of layers below the `upper` last ones of a model folder; reads its config.json only.

    `TrainingError` if it is neither a Llama nor a Qwen2 model, or if no layer is left below.
    """
    try:
        shape = find_shape(str(folder), Path())
    except ArtifactError as error:
        raise TrainingError(f"upper layers cannot be trained alone: {error}; train without `layers`") from error
    if problem := too_many(upper, shape.layers):
        raise TrainingError(problem)
    return shape.layers - upper


def too_many(upper: int, layers: int) -> str:
    """The problem with training the `upper` last of a model's layers; empty if there is none."""
    if upper < layers:
        return ""
    return f"layers: {upper}, but the model has {layers}; give at most {layers - 1}, or leave it out to train all"


@contextmanager
def only(model: Any, first: int, last: int | None = None, norm: bool = True) -> Iterator[Any]:
    """The causal language model `model` (or that of a peft model) with its layers `first` to `last` only.

    The layers are the same objects, so that training them trains the model. Without `norm` the final norm is left out.
    """
    core = language_model(model)
    inner, config = core.model, core.config
    changed = {"num_hidden_layers": len(inner.layers[first:last])}
    if getattr(config, "layer_types", None):
        changed["layer_types"] = config.layer_types[first:last]  # a layer's kind of attention is found by its position
    before, layers, final = {name: getattr(config, name) for name in changed}, inner.layers, inner.norm
    try:
        _set(config, changed)
        inner.layers = layers[first:last]
        if not norm:
            inner.norm = nn.Identity()
        yield core
    finally:
        inner.layers, inner.norm = layers, final
        _set(config, before)


def _set(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


@torch.no_grad()
def lower_states(model: Any, ids: Tensor, below: int) -> Tensor:
    """Hidden states of token ids `[rows, positions]` after the first `below` layers: `[rows, positions, hidden]`."""
    with only(model, 0, below, norm=False) as core:
        states: Tensor = core.model(input_ids=ids, use_cache=False).last_hidden_state
    return states
