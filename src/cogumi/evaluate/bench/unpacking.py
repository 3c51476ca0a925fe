"""Row about packed bundles: speed of unpacking (SPEC D6)."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from cogumi.bundle.packed import Archive
from cogumi.compress.pack.archive import Config, pack
from cogumi.core.files import sha256
from cogumi.engine.llama.binding.quantize import quantize_rows
from cogumi.evaluate.bench.paired import Row, Setup, alternate

GOAL = 400.0
"""Least megabytes per second of output, including checksums."""
ROUNDS = 3
DRAWN = (8192, 1024)
"""Shape of the random weights; a file repeats them at a distance larger than a frame."""


def unpack(setup: Setup) -> Row:
    """Megabytes per second of unpacking a model, including both checksums, against copying and verifying the file.

    The blocks of a synthetic model repeat, so random weights of its size are used instead, which compress like trained
    ones. `cpu` is the processor time per megabyte, which does not depend on other load.
    """
    with TemporaryDirectory(dir=setup.folder) as folder:
        scratch = Path(folder)
        source = setup.model if setup.shape is None else _weights(scratch / "model.gguf", setup.model.stat().st_size)
        (scratch / "packed").mkdir()
        figures = pack(source.parent, [source.name], scratch / "packed", Config())
        archive, megabytes = Archive(scratch / "packed"), source.stat().st_size / 1e6
        cpu = []

        def unpacked() -> float:
            began, times = time.perf_counter(), os.times()
            archive.extract(source.name, scratch / "out")
            seconds, spent = time.perf_counter() - began, os.times()
            cpu.append(1e3 * (spent.user + spent.system - times.user - times.system) / megabytes)
            (scratch / "out").unlink()
            return megabytes / seconds

        def copied() -> float:
            began = time.perf_counter()
            shutil.copyfile(source, scratch / "out")
            sha256(scratch / "out")
            seconds = time.perf_counter() - began
            (scratch / "out").unlink()
            return megabytes / seconds

        row = alternate(unpacked, copied, setup.tick, ROUNDS).row(
            "unpack", "MB/s", cpu=f"{median(cpu):.2f} ms", smaller=figures["ratio"], baseline="a copy, checked"
        )
    assert row.value is not None
    return replace(row, conditions=row.conditions | {"goal": f">= {GOAL:g} MB/s", "met": row.value >= GOAL})


def _weights(path: Path, size: int) -> Path:
    """A file of `size` bytes with the types of Q4_K_M: two thirds of the weights in Q4_K, the others in Q6_K."""
    drawn = np.random.default_rng(0).standard_normal(DRAWN, np.float32)
    q4, q6 = (quantize_rows(drawn, type).tobytes() for type in ("Q4_K", "Q6_K"))
    with path.open("wb") as file:
        while file.tell() < size:
            file.write((q4 + q4 + q6)[: size - file.tell()])
    return path
