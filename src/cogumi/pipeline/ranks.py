"""Distributed training within a build: process 0 runs the recipe, the others join its training steps (SPEC C1).

`accelerate launch --num_processes 4 -m cogumi build my_recipe.yaml` starts the same command four times on one machine.
Process 0 builds as a single process would, and appends the name of each training step it starts to a file. The others
read that file, run these steps in temporary folders, and end with process 0.
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
"""Seconds between two reads of the file."""


def rank() -> int:
    """Index of this process in its launch; 0 without a launch."""
    return int(os.environ.get("RANK", "0"))


def several() -> bool:
    """Whether the launch has more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _file(home: Path) -> Path:
    """The file of the running launch, named after the parent process, which all its processes share."""
    return home / f".training-{os.getppid()}"


class Leader:
    """The messages of process 0 to the others."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def train(self, step: str) -> None:
        """Announce that a training step starts now."""
        if several():
            with _file(self._home).open("a", encoding="utf-8") as file:
                file.write(f"{step}\n")


@contextmanager
def leading(home: Path) -> Iterator[Leader]:
    """Context of process 0 for a whole build: creates the file and removes it."""
    if several():
        home.mkdir(parents=True, exist_ok=True)
        _file(home).touch()
    try:
        yield Leader(home)
    finally:
        if several():
            _file(home).unlink()


def steps_to_join(home: Path) -> Iterator[str]:
    """For the other processes: the training steps that process 0 starts, until it ends."""
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
    """A temporary output folder of another process for a step; its checkpoint links to that of process 0."""
    folder = home / f".helper-{rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / CHECKPOINT).symlink_to((home / step / CHECKPOINT).resolve())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
