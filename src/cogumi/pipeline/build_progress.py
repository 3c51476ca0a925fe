"""What a build tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Progress(Protocol):
    """Watches a build. For each step: `started`, any number of `advanced`, then `finished` or `failed`.

    Several steps may be under way at once. All calls come from one thread.
    """

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Step `number` (from 1) begins; `reason` is empty, or says why work is continued or done again."""

    def advanced(self, step: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """`done` of `total` (None: unknown) units of the step's work are done; `figures` are worth showing."""

    def printed(self, step: str, line: str) -> None:
        """The process of a step printed a line, such as a library's warning."""

    def finished(self, step: str, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """The step is done; `skipped` if it had been done before."""

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
