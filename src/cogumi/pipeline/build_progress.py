"""The interface through which a build reports its progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Progress(Protocol):
    """Receives the events of a build. For each step: `started`, any number of `advanced`, then `finished` or `failed`.

    Several steps may run at once. All calls come from one thread.
    """

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Step `number` (from 1) starts; `reason` explains why work is continued or repeated, or is empty."""

    def advanced(self, step: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """`done` of `total` (None: unknown) units of the step's work are done; `figures` are shown with them."""

    def printed(self, step: str, line: str) -> None:
        """The process of a step printed a line, such as a library's warning."""

    def finished(self, step: str, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """The step is finished; `skipped` if an earlier build finished it."""

    def failed(self, step: str, reason: str, running: Sequence[str]) -> None:
        """The step failed; the build ends when the steps in `running` have ended."""


class Silent:
    """A `Progress` that shows nothing."""

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Show nothing."""

    def advanced(self, step: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Show nothing."""

    def printed(self, step: str, line: str) -> None:
        """Show nothing."""

    def finished(self, step: str, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """Show nothing."""

    def failed(self, step: str, reason: str, running: Sequence[str]) -> None:
        """Show nothing."""
