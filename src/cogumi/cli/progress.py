"""Bars with the time left, for what takes more than two seconds; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(slots=True)
class _Step:
    """A step that is shown: its bar on a terminal, and what its last line said."""

    title: str
    bar: TaskID | None
    began: float
    told: float
    figures: str = ""


class BuildProgress(_Shown):
    """Shows a build: a bar for every step under way on a terminal, otherwise a plain line for each now and then."""

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
        self._steps: dict[str, _Step] = {}

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Name the step that begins and why it runs again, if it does."""
        title = escape(f"[{number}/{of}] {step} ({stage})")
        bar = self._bar.add_task(title, total=None, figures="") if NOTES.is_terminal else None
        now = time.monotonic()
        self._steps[step] = _Step(title, bar, now, now)
        if reason or not NOTES.is_terminal:
            NOTES.print(f"{title}{f': {escape(reason)}' if reason else ''}", soft_wrap=True)

    def advanced(self, step: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Move the bar of the step, or print a line if its last one is old."""
        shown, now = self._steps[step], time.monotonic()
        shown.figures = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if shown.bar is not None:
            self._bar.update(shown.bar, completed=done, total=total, figures=shown.figures)
        elif now - shown.told >= self.PLAIN_EVERY:
            shown.told = now
            left = f", {duration((now - shown.began) / done * (total - done))} left" if total and done else ""
            NOTES.print(f"  {step}: {done}{f' of {total}' if total else ''}{left}  {shown.figures}", soft_wrap=True)

    def printed(self, step: str, line: str) -> None:
        """Pass on what the process of a step printed, above the bars."""
        NOTES.print(line, markup=False, soft_wrap=True)

    def finished(self, step: str, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """Say how long the step took."""
        shown = self._steps[step]
        self._remove(step)
        took = "unchanged" if skipped else duration(seconds)
        NOTES.print(f"[green]✓[/] {shown.title}  {took}  [dim]{shown.figures}[/]", soft_wrap=True)

    def failed(self, step: str, reason: str, running: Sequence[str]) -> None:
        """Say what went wrong, and which steps the end of the build still waits for."""
        self._remove(step)
        waits = f"; waiting for {', '.join(running)}, Ctrl-C stops it" if running else ""
        NOTES.print(f"[red]✗[/] {escape(reason)}{waits}", soft_wrap=True)

    def _remove(self, step: str) -> None:
        """Take the step's bar away; a step that failed before it started has none."""
        shown = self._steps.pop(step, None)
        if shown is not None and shown.bar is not None:
            self._bar.remove_task(shown.bar)


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
        self._build.advanced(self._name, done, total, figures)


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
