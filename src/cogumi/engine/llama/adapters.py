"""The LoRA adapters of a running engine: loaded on demand, freed when memory is short (SPEC E8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cogumi.engine.llama.binding.model import Model

Source = Path | Callable[[], Path]
"""A LoRA file, or a function that provides it at first use; only then is it checked against the model."""


class Adapters:
    """Named LoRA files for one model, with loaded or unloaded weights; `given` are the initial ones.

    Used only on the engine's thread.
    """

    def __init__(self, model: Model, given: Mapping[str, Source]) -> None:
        self._model = model
        self._paths: dict[str, Source] = {}
        self._loaded: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        for name, source in given.items():
            if isinstance(source, Path):
                self.add(name, source)
            else:
                self._paths[name] = source

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order of addition."""
        return tuple(self._paths)

    def add(self, name: str, path: Path) -> None:
        """Load a file under a name; `BundleError` without any change if it does not fit the model."""
        loaded = self._model.load_adapter(path)
        self.free(name)
        self._paths[name], self._loaded[name], self._bytes[name] = path, loaded, path.stat().st_size

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of adapters whose weights are in memory, least recently used first."""
        return tuple(self._loaded)

    def weights(self, name: str) -> Any:
        """The weights of an adapter; loads them if necessary and marks them as most recently used."""
        if name not in self._loaded:
            source = self._paths[name]
            self.add(name, source if isinstance(source, Path) else source())
        weights = self._loaded.pop(name)
        self._loaded[name] = weights
        return weights

    def bytes(self, name: str) -> int:
        """Size of the weights in memory when loaded."""
        return self._bytes[name]

    def free(self, name: str) -> None:
        """Free the weights if loaded; no context may be using them."""
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            self._model.free_adapter(loaded)
