"""Bars with the time left, for what takes more than two seconds; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from cogumi.cli.console import NOTES
from cogumi.core.amounts import duration, size


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class _Shown:
    """A bar that is there within a `with`, on a terminal."""

    _bar: Progress

    def __enter__(self) -> Self:
        if NOTES.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if NOTES.is_terminal:
            self._bar.stop()


class BuildProgress(_Shown):
    """Shows a build: a bar with the time left on a terminal, otherwise a plain line now and then."""

    PLAIN_EVERY = 15.0  # seconds between lines of one step

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            console=NOTES,
            transient=True,
        )
        self._task: TaskID | None = None
        self._title = self._last = ""
        self._began = self._told = 0.0

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Name the step that begins and why it runs again, if it does."""
        self._title, self._last = f"[{number}/{of}] {step} ({stage})", ""
        self._began = self._told = time.monotonic()
        title = escape(self._title)
        if NOTES.is_terminal:
            self._task = self._bar.add_task(title, total=None, figures="")
        if reason or not NOTES.is_terminal:
            NOTES.print(f"{title}{f': {escape(reason)}' if reason else ''}")

    def advanced(self, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Move the bar, or print a line if the last one is old."""
        self._last = _figures(figures)
        now = time.monotonic()
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total, figures=self._last)
        elif now - self._told >= self.PLAIN_EVERY:
            self._told = now
            left = f", {duration((now - self._began) / done * (total - done))} left" if total and done else ""
            NOTES.print(f"  {done}{f' of {total}' if total else ''}{left}  {self._last}")

    def finished(self, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """Tell what the step took."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        took = "unchanged" if skipped else duration(seconds)
        NOTES.print(f"[green]✓[/] {escape(self._title)}  {took}  [dim]{self._last}[/]")


class SuiteProgress:
    """Shows how far a suite is: a bar with the time left on a terminal, otherwise a plain line now and then."""

    def __init__(self, name: str) -> None:
        self._build, self._name = BuildProgress(), name

    def __enter__(self) -> SuiteProgress:
        self._build.__enter__()
        self._build.started(self._name, "suite", 1, 1, "")
        return self

    def __exit__(self, *_: object) -> None:
        self._build.__exit__()

    def advanced(self, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Move the bar."""
        self._build.advanced(done, total, figures)


class ByteProgress:
    """Shows bytes that are done, if it takes longer than `QUIET`: a bar on a terminal, else a line now and then."""

    QUIET = 2.0  # seconds

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=NOTES,
            transient=True,
        )
        self._title, self._task = title, self._bar.add_task(escape(title), total=None)
        self._began = self._told = time.monotonic()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advanced(self, done: int, total: int) -> None:
        """Move the bar, or print a line if the last one is old."""
        now = time.monotonic()
        self._bar.update(self._task, completed=done, total=total)
        if NOTES.is_terminal:
            if now - self._began > self.QUIET:
                self._bar.start()
        elif now - self._told >= BuildProgress.PLAIN_EVERY:
            self._told = now
            left = duration((now - self._began) / done * (total - done))
            NOTES.print(f"{self._title}: {size(done)} of {size(total)}, {left} left", markup=False, soft_wrap=True)


class BenchProgress(_Shown):
    """Shows a benchmark: a bar over all rows with the time left on a terminal, otherwise a line per row."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=NOTES,
            transient=True,
        )
        self._task = self._bar.add_task("making the model", total=None)
        self._before = 0

    def started(self, name: str, number: int, of: int) -> None:
        """Name the row that begins."""
        self._before = number - 1
        self._bar.update(self._task, description=escape(name), total=of, completed=self._before)
        if not NOTES.is_terminal:
            NOTES.print(f"[{number}/{of}] {name}", markup=False)

    def advanced(self, share: float) -> None:
        """Move the bar within a row."""
        self._bar.update(self._task, completed=self._before + share)
