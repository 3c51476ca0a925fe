"""The lanes of one engine: a context for each adapter in use, kept warm within a memory budget (SPEC E1, E8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogumi.core.errors import RequestError
from cogumi.engine.llama.adapter_context import Lane
from cogumi.engine.llama.adapters import Adapters


class Lanes:
    """Opens a lane when its adapter is first asked for. Belongs to the scheduler's thread.

    While adapters take more than `budget` bytes (None: no limit) for their weights and `lane_bytes` for each lane,
    the longest unused one is closed and its weights freed; never one that is answering. The base's lane stays.
    """

    def __init__(
        self, adapters: Adapters, open_lane: Callable[[Any], Lane], *, lane_bytes: int, budget: int | None
    ) -> None:
        self._adapters, self._open_lane = adapters, open_lane
        self._lane_bytes, self._budget = lane_bytes, budget
        self._open: dict[str | None, Lane] = {}
        self._make_room(None)

    def get(self, adapter: str | None) -> Lane:
        """The lane of an adapter (None: the base), opened if need be; `CogumiError` if that fails."""
        weights = self._adapters.weights(adapter) if adapter else None
        if adapter not in self._open:
            self._make_room(adapter)
            self._open[adapter] = self._open_lane(weights)
        return self._open[adapter]

    def all(self) -> list[Lane]:
        """Those that are open now."""
        return list(self._open.values())

    def add(self, name: str, path: Path) -> None:
        """Make a LoRA file available; one of the same name is replaced, unless it is answering just now."""
        if self._busy(name):
            raise RequestError(f"adapter {name!r} is answering just now; replace it when it is idle")
        self._close(name)
        self._adapters.add(name, path)
        self._make_room(name)

    def close(self) -> None:
        """Free them all."""
        for name in list(self._open):
            self._close(name)

    def _busy(self, name: str | None) -> bool:
        return name in self._open and len(self._open[name]) > 0

    def _close(self, name: str | None) -> None:
        lane = self._open.pop(name, None)
        if lane:
            lane.close()

    def _make_room(self, wanted: str | None) -> None:
        """Free idle adapters until the budget holds with `wanted` among them."""
        for name in self._adapters.loaded:
            if self._budget is None or self._taken(wanted) <= self._budget:
                return
            if name != wanted and not self._busy(name):
                self._close(name)
                self._adapters.free(name)

    def _taken(self, wanted: str | None) -> int:
        lanes = {*self._open, wanted} - {None}
        return sum(map(self._adapters.bytes, self._adapters.loaded)) + self._lane_bytes * len(lanes)
