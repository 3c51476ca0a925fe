"""Pool of adapter contexts: one for each adapter in use, kept open within a memory budget (SPEC E1, E8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogumi.core.errors import RequestError
from cogumi.engine.llama.adapter_context import AdapterContext
from cogumi.engine.llama.adapters import Adapters


class ContextPool:
    """Opens the context of an adapter at its first use. Used only on the scheduler's thread.

    While adapter weights and `context_bytes` per open adapter context exceed `budget` bytes (None: no limit), the
    least recently used idle adapter is closed and its weights are freed. The base's context is never closed.
    """

    def __init__(
        self,
        adapters: Adapters,
        open_context: Callable[[Any], AdapterContext],
        *,
        context_bytes: int,
        budget: int | None,
    ) -> None:
        self._adapters, self._open_context = adapters, open_context
        self._context_bytes, self._budget = context_bytes, budget
        self._open: dict[str | None, AdapterContext] = {}
        self._evict(None)

    def get(self, adapter: str | None) -> AdapterContext:
        """The context of an adapter (None: the base), opened if necessary; `CogumiError` if that fails."""
        weights = self._adapters.weights(adapter) if adapter else None
        if adapter not in self._open:
            self._evict(adapter)
            self._open[adapter] = self._open_context(weights)
        return self._open[adapter]

    def all(self) -> list[AdapterContext]:
        """The open contexts."""
        return list(self._open.values())

    def add(self, name: str, path: Path) -> None:
        """Make a LoRA file available; replaces an idle adapter of the same name, `RequestError` if it is in use."""
        if self._busy(name):
            raise RequestError(f"adapter {name!r} is in use; replace it when it is idle")
        self._close(name)
        self._adapters.add(name, path)
        self._evict(name)

    def close(self) -> None:
        """Free all contexts."""
        for name in list(self._open):
            self._close(name)

    def _busy(self, name: str | None) -> bool:
        return name in self._open and len(self._open[name]) > 0

    def _close(self, name: str | None) -> None:
        context = self._open.pop(name, None)
        if context is not None:  # its length is the number of its jobs
            context.close()

    def _evict(self, needed: str | None) -> None:
        """Free idle adapters until the memory including the context of `needed` is within the budget."""
        for name in self._adapters.loaded:
            if self._budget is None or self._memory(needed) <= self._budget:
                return
            if name != needed and not self._busy(name):
                self._close(name)
                self._adapters.free(name)

    def _memory(self, needed: str | None) -> int:
        contexts = {*self._open, needed} - {None}
        return sum(map(self._adapters.bytes, self._adapters.loaded)) + self._context_bytes * len(contexts)
