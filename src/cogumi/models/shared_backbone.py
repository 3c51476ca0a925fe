"""A frozen model with a shared LoRA update and several heads, one of which is chosen per row (SPEC C10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogumi.core.errors import ArtifactError
from cogumi.models.lora_factors import Adapter, Factors, padded


class _Layer(nn.Module):
    """The update of one linear layer: a shared one for all rows, plus the head chosen for each row."""

    def __init__(self, shared: Factors | None, heads: Sequence[Factors]) -> None:
        super().__init__()
        a, b = padded(heads)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.shared_a = nn.Parameter(shared.a.clone()) if shared else None
        self.shared_b = nn.Parameter(shared.b.clone()) if shared else None

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """`x` `[rows, positions, in]`, heads `which` `[rows]` -> the term to add to the layer's output."""
        own = x @ self.a[which].mT @ self.b[which].mT
        if self.shared_a is None or self.shared_b is None:
            return own
        return own + x @ self.shared_a.T @ self.shared_b.T


class Backbone(nn.Module):
    """A frozen model with a shared update and one of several heads for each row."""

    def __init__(self, model: Any, shared: Adapter, heads: Sequence[Adapter]) -> None:
        super().__init__()
        _fits(model, heads[0])
        self.model = model.requires_grad_(False)
        self.names = list(heads[0])
        self.layers = nn.ModuleList(_Layer(shared.get(n), [head[n] for head in heads]) for n in self.names)
        self.which = torch.zeros(0, dtype=torch.long)
        self.hooks = [
            model.get_submodule(name).register_forward_hook(self._hook(layer))
            for name, layer in zip(self.names, self.layers, strict=True)
        ]

    def _hook(self, layer: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, inputs, output: output + layer(inputs[0], self.which.to(output.device))

    def under(self, which: Tensor) -> Any:
        """The model; its next pass uses these heads `[rows]`."""
        self.which = which
        return self.model

    def release(self) -> None:
        """Remove all updates from the model."""
        for hook in self.hooks:
            hook.remove()

    def shared(self) -> Adapter:
        """The shared update, empty if there is none."""
        return {
            name: Factors(layer.shared_a.detach().cpu(), layer.shared_b.detach().cpu())
            for name, layer in self._layers()
            if layer.shared_a is not None
        }

    def head(self, index: int) -> Adapter:
        """The update of one head."""
        return {n: Factors(layer.a[index].detach().cpu(), layer.b[index].detach().cpu()) for n, layer in self._layers()}

    def _layers(self) -> list[tuple[str, Any]]:
        return list(zip(self.names, self.layers, strict=True))


def _fits(model: nn.Module, adapter: Adapter) -> None:
    """Raise `ArtifactError` for the first layer that the model lacks or that has another shape."""
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, factors in adapter.items():
        if shapes.get(name) != factors.shape:
            has = f"one of shape {list(shapes[name])}" if name in shapes else "no such layer"
            raise ArtifactError(
                f"the adapters are made for {name} of shape {list(factors.shape)}, the model has {has}; "
                "give the model on which they were trained"
            )
