"""Several processes build one recipe: the first runs it, the others help where a stage trains (SPEC C1).

`accelerate launch --num_processes 4 -m cogumi build my_recipe.yaml` starts the same command four times on one machine.
Process 0 does what a single one does, and writes down which training steps it begins; the others read that, train along
in folders of their own, which are thrown away, and end when process 0 does.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogumi.core.stage import CHECKPOINT

WAIT = 0.1
"""Seconds between two looks."""


def rank() -> int:
    """Which of the processes of a launch this is; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def several() -> bool:
    """Whether this process is one of many."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _file(home: Path) -> Path:
    """Processes of one launch have one parent."""
    return home / f".training-{os.getppid()}"


class Leader:
    """What process 0 tells the others."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def train(self, step: str) -> None:
        """This step begins to train now."""
        if several():
            with _file(self._home).open("a", encoding="utf-8") as file:
                file.write(f"{step}\n")


@contextmanager
def leading(home: Path) -> Iterator[Leader]:
    """Process 0, from its first step to its last."""
    if several():
        home.mkdir(parents=True, exist_ok=True)
        _file(home).touch()
    try:
        yield Leader(home)
    finally:
        if several():
            _file(home).unlink()


def steps_to_join(home: Path) -> Iterator[str]:
    """For the others: the steps that process 0 begins to train, until it ends."""
    while not _file(home).exists():
        time.sleep(WAIT)
    joined = 0
    while True:
        try:
            steps = _file(home).read_text("utf-8").split()
        except FileNotFoundError:
            return
        if len(steps) == joined:
            time.sleep(WAIT)
            continue
        yield steps[joined]
        joined += 1


@contextmanager
def helping(home: Path, step: str) -> Iterator[Path]:
    """A folder for a helper's copy of a step; its checkpoint is that of process 0."""
    folder = home / f".helper-{rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / CHECKPOINT).symlink_to((home / step / CHECKPOINT).resolve())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
