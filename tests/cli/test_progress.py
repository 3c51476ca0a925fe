"""Progress of a build: a bar for each running step, or lines; and Ctrl-C."""

import io
import json
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from cogumi.cli import progress
from cogumi.cli.progress import BuildProgress


def shown_on(monkeypatch, terminal):
    """A console of 120 columns in place of standard error."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, color_system=None)
    monkeypatch.setattr(progress, "STDERR", console)
    return console


def test_terminal_shows_a_bar_for_each_running_step(monkeypatch):
    console, shown = shown_on(monkeypatch, True), BuildProgress()

    def bars():
        with console.capture() as captured:
            console.print(shown._bar.get_renderable())
        return captured.get().splitlines()

    shown.started("base", "sft", 1, 3, "")
    shown.started("draft", "draft", 2, 3, "")
    shown.advanced("draft", 5, 10, {"loss": 2.5})
    first, second = bars()
    assert "[1/3] base (sft)" in first
    assert "[2/3] draft (draft)" in second
    assert "50%" in second
    assert "loss 2.5" in second
    shown.printed("base", "a [library] warns")
    shown.finished("draft", 61.0, False, {})
    (left,) = bars()
    assert "base" in left
    shown.failed("base", "step 'base': too bad", ["other"])
    assert not "".join(bars()).strip()
    said = console.file.getvalue()
    assert "a [library] warns" in said
    assert "✓ [2/3] draft (draft)  1 min 1 s  loss 2.5" in said
    assert "✗ step 'base': too bad; waiting for other (Ctrl-C stops them)" in said


def test_lines_without_a_terminal_name_their_step(monkeypatch):
    console, shown = shown_on(monkeypatch, False), BuildProgress()
    monkeypatch.setattr(BuildProgress, "PLAIN_EVERY", 0.0)
    shown.started("base", "sft", 1, 2, "continues where it was interrupted")
    shown.started("net", "critic", 2, 2, "")
    shown.advanced("net", 3, None, {})
    shown.advanced("base", 10, 10, {"loss": 1.0})
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[:3] == ["[1/2] base (sft): continues where it was interrupted", "[2/2] net (critic)", "  net: 3"]
    assert lines[3].startswith("  base: 10 of 10, ")
    assert lines[3].endswith("left  loss 1")


def test_time_left_is_that_of_the_current_phase(monkeypatch):
    """A new total begins a phase, as training after a caching pass; the time before does not count."""
    console, shown = shown_on(monkeypatch, False), BuildProgress()
    monkeypatch.setattr(BuildProgress, "PLAIN_EVERY", 0.0)
    times = iter((0.0, 100.0, 100.0, 110.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    shown.started("math", "modifier", 1, 1, "")
    shown.advanced("math", 50, 100, {})
    shown.advanced("math", 1, 20, {})
    shown.advanced("math", 2, 20, {})
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines[1].startswith("math: 50 of 100, 1 min 40 s left")
    assert lines[3].startswith("math: 2 of 20, 1 min 30 s left")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_stops_all_steps_and_says_how_to_continue(tmp_path, jobs):
    steps = [{"name": name, "stage": "world", "config": {"train": 10**7}} for name in ("a", "b")]
    (tmp_path / "long.yaml").write_text(json.dumps({"name": "long", "steps": steps}))
    command = [sys.executable, "-m", "cogumi", "build", "long.yaml", "--jobs", jobs]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        begun = [process.stderr.readline() for _ in range(int(jobs))]
        assert [line[:7] for line in begun] == ["[1/2] a", "[2/2] b"][: int(jobs)]
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert said.endswith("cogumi: stopped; finished steps are kept: run the same command again to continue\n")
    assert "Traceback" not in said
