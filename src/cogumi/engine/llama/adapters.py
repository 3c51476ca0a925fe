"""The adapters of a running engine: loaded when needed, freed when memory is short, remembered (SPEC E8)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cogumi.core.errors import BundleError
from cogumi.core.files import write_json
from cogumi.engine.llama.binding.model import Model

Source = Path | Callable[[], Path]
"""A LoRA file, or what makes one when it is first needed; only then is it known whether that fits the model."""


class Adapters:
    """Names and LoRA files for one model; the weights of each are loaded or not. Belongs to the engine's thread.

    `given` are there from the start; with `remember`, what is added later stands in that file (JSON, name to
    path) and is there again after a restart.
    """

    def __init__(self, model: Model, given: Mapping[str, Source], remember: Path | None) -> None:
        self._model, self._remember = model, remember
        self._paths: dict[str, Source] = {}
        self._loaded: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        for name, source in given.items():
            if isinstance(source, Path):
                self._put(name, source)
            else:
                self._paths[name] = source
        self._added = _recall(remember)
        for name, path in self._added.items():
            self._put(name, path)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of adding."""
        return tuple(self._paths)

    def add(self, name: str, path: Path) -> None:
        """Load a file under a name; `BundleError`, and nothing changed, if it does not fit the model."""
        self._put(name, path)
        if self._remember:
            self._added[name] = path.resolve()
            write_json(self._remember, {name: str(path) for name, path in self._added.items()})

    @property
    def loaded(self) -> tuple[str, ...]:
        """Those whose weights are in memory, longest unused first."""
        return tuple(self._loaded)

    def weights(self, name: str) -> Any:
        """The loaded weights, loaded again if they were freed."""
        if name not in self._loaded:
            source = self._paths[name]
            self._put(name, source if isinstance(source, Path) else source())
        weights = self._loaded.pop(name)
        self._loaded[name] = weights
        return weights

    def _put(self, name: str, path: Path) -> None:
        loaded = self._model.load_adapter(path)
        self.free(name)
        self._paths[name], self._loaded[name], self._bytes[name] = path, loaded, path.stat().st_size

    def bytes(self, name: str) -> int:
        """What the weights take in memory, loaded or not."""
        return self._bytes[name]

    def free(self, name: str) -> None:
        """Free the weights, if loaded; no context may use them any more."""
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            self._model.free_adapter(loaded)


def _recall(file: Path | None) -> dict[str, Path]:
    if file is None or not file.exists():
        return {}
    try:
        known = json.loads(file.read_text("utf-8"))
        return {str(name): Path(path) for name, path in known.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise BundleError(f"{file} does not list adapters ({error}); delete it and add them again") from error
