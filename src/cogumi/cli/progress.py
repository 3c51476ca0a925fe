"""Progress bars with the time left, for work of more than two seconds; plain lines without a terminal."""

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

from cogumi.cli.console import STDERR
from cogumi.core.amounts import duration, size


class _TerminalBar:
    """Context manager that shows a bar if standard error is a terminal."""

    _bar: Progress

    def __enter__(self) -> Self:
        if STDERR.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if STDERR.is_terminal:
            self._bar.stop()


@dataclass(slots=True)
class _Step:
    """Display state of a step: its bar on a terminal, the start of its current phase, the time of its last line, the
    work of the phase (a new total begins a new phase), its last figures.
    """

    title: str
    bar: TaskID | None
    began: float
    last_line: float
    total: int | None = None
    figures: str = ""


class BuildProgress(_TerminalBar):
    """Shows a build: a bar for every running step on a terminal, otherwise occasional plain lines."""

    PLAIN_EVERY = 15.0  # seconds between lines of one step

    def __init__(self) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            console=STDERR,
            transient=True,
        )
        self._steps: dict[str, _Step] = {}

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Show a started step, and the reason if it runs again."""
        title = escape(f"[{number}/{of}] {step} ({stage})")
        bar = self._bar.add_task(title, total=None, figures="") if STDERR.is_terminal else None
        now = time.monotonic()
        self._steps[step] = _Step(title, bar, now, now)
        if reason or not STDERR.is_terminal:
            STDERR.print(f"{title}{f': {escape(reason)}' if reason else ''}", soft_wrap=True)

    def advanced(self, step: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Move the bar of the step, or print a line if the last one is old."""
        shown, now = self._steps[step], time.monotonic()
        shown.figures = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if total != shown.total:
            shown.total, shown.began = total, shown.began if shown.total is None else now
        if shown.bar is not None:
            self._bar.update(shown.bar, completed=done, total=total, figures=shown.figures)
        elif now - shown.last_line >= self.PLAIN_EVERY:
            shown.last_line = now
            left = f", {duration((now - shown.began) / done * (total - done))} left" if total and done else ""
            STDERR.print(f"  {step}: {done}{f' of {total}' if total else ''}{left}  {shown.figures}", soft_wrap=True)

    def printed(self, step: str, line: str) -> None:
        """Show a line printed by the process of a step, above the bars."""
        STDERR.print(line, markup=False, soft_wrap=True)

    def finished(self, step: str, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """Show the time that the step took."""
        shown = self._steps[step]
        self._remove(step)
        took = "unchanged" if skipped else duration(seconds)
        STDERR.print(f"[green]✓[/] {shown.title}  {took}  [dim]{shown.figures}[/]", soft_wrap=True)
        for line in metrics.get("warnings", ()):
            STDERR.print(f"  [yellow]![/] {escape(step)}: {escape(line)}", soft_wrap=True)

    def failed(self, step: str, reason: str, running: Sequence[str]) -> None:
        """Show the reason of a failure, and the steps that are still running."""
        self._remove(step)
        waits = f"; waiting for {', '.join(running)} (Ctrl-C stops them)" if running else ""
        STDERR.print(f"[red]✗[/] {escape(reason)}{waits}", soft_wrap=True)

    def _remove(self, step: str) -> None:
        """Remove the step's bar; a step that failed before its start has none."""
        shown = self._steps.pop(step, None)
        if shown is not None and shown.bar is not None:
            self._bar.remove_task(shown.bar)


class SuiteProgress:
    """Shows the progress of a suite: a bar on a terminal, otherwise occasional plain lines."""

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
    """Shows processed bytes after `QUIET` seconds: a bar on a terminal, otherwise occasional plain lines."""

    QUIET = 2.0  # seconds

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=STDERR,
            transient=True,
        )
        self._title, self._task = title, self._bar.add_task(escape(title), total=None)
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advanced(self, done: int, total: int) -> None:
        """Move the bar, or print a line if the last one is old."""
        now = time.monotonic()
        self._bar.update(self._task, completed=done, total=total)
        if STDERR.is_terminal:
            if now - self._began > self.QUIET:
                self._bar.start()
        elif now - self._last_line >= BuildProgress.PLAIN_EVERY:
            self._last_line = now
            left = duration((now - self._began) / done * (total - done))
            STDERR.print(f"{self._title}: {size(done)} of {size(total)}, {left} left", markup=False, soft_wrap=True)


class RowProgress:
    """Shows counted rows after `ByteProgress.QUIET` seconds, on a terminal."""

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description} {task.completed:,.0f} rows"), console=STDERR, transient=True
        )
        self._task = self._bar.add_task(escape(title), total=None)
        self._began = time.monotonic()

    def __enter__(self) -> RowProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advanced(self, done: int) -> None:
        """Show the number of rows read so far."""
        self._bar.update(self._task, completed=done)
        if STDERR.is_terminal and time.monotonic() - self._began > ByteProgress.QUIET:
            self._bar.start()


class BenchProgress(_TerminalBar):
    """Shows a benchmark: one bar over all rows on a terminal, otherwise a line per row."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=STDERR,
            transient=True,
        )
        self._task = self._bar.add_task("preparing the model", total=None)
        self._before = 0

    def started(self, name: str, number: int, of: int) -> None:
        """Show a started row."""
        self._before = number - 1
        self._bar.update(self._task, description=escape(name), total=of, completed=self._before)
        if not STDERR.is_terminal:
            STDERR.print(f"[{number}/{of}] {name}", markup=False)

    def advanced(self, share: float) -> None:
        """Move the bar within a row."""
        self._bar.update(self._task, completed=self._before + share)
