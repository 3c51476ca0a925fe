"""What passes cost: measured once per machine and model and kept on disk, or assumed on paper (SPEC E2)."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cogumi.core.environment import cache_folder, usable_threads
from cogumi.core.files import write_json
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.speculative.latency_model import MOST, Costs
from cogumi.engine.llama.speculative.speculation import best_k, expected_speedup

Key = Mapping[str, str | int]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


QUICK = 0.005
"""Seconds of a pass below which timing every size takes no time that anybody notices."""


def pass_seconds(model: Model, most: int, threads: int) -> tuple[float, ...]:
    """Seconds of passes over 1, 2, .. `most` tokens of one sequence, each the fastest of a few.

    Slow passes are timed at 1, 2, 4, 8, .. tokens only, with straight lines between them.
    """
    context = Context(model, sequences=1, length=2 * most, batch=most, threads=threads)

    def fastest(tokens: int, times: int) -> float:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            context.decode([Row(0, [0] * tokens, 0, tokens)])
            seconds.append(time.perf_counter() - began)
            context.trim(0, 0)
        return min(seconds)

    try:
        one = fastest(1, 3)
        quick = one < QUICK
        sizes = [n for n in range(1, most + 1) if quick or n == most or n & (n - 1) == 0]
        known = [fastest(n, 5 if quick else 2) for n in sizes]
    finally:
        context.close()
    return tuple(np.interp(range(1, most + 1), sizes, np.maximum.accumulate(known)).tolist())


class Stored(BaseModel):
    """The file of a measurement; `key` says what was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: dict[str, str | int]
    draft: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verify: Annotated[tuple[Seconds, ...], Field(min_length=1)]


def measured_costs(measure: Callable[[], Costs], key: Key) -> Costs:
    """The costs measured earlier under the same `key`, else those measured now, kept for the next time.

    A file that cannot be read, or is of another key, is replaced; a folder that cannot be written is no error.
    """
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"costs-{name}.json"
    try:
        stored = Stored.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        stored = None
    if stored and stored.key == dict(key):
        return Costs(stored.draft, stored.verify)
    costs = measure()
    with suppress(OSError):
        write_json(path, {"key": key, "draft": costs.draft, "verify": costs.verify})
    return costs


def machine_key() -> dict[str, str | int]:
    """What the speed of a pass depends on besides the model: processor, how many of them, and llama.cpp's version."""
    return {
        "cpu": _cpu(),
        "processors": usable_threads(),
        "llama-cpp-python": metadata.version("llama-cpp-python"),
    }


def file_key(path: Path) -> dict[str, str | int]:
    """What tells one model file from another without reading it. Raises `OSError` if there is none."""
    stat = path.stat()
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _curve(draft: float, milliseconds: Mapping[int, float]) -> Costs:
    """Costs through a few points (tokens: milliseconds), linear between them; `draft` in milliseconds."""
    verify = np.interp(range(1, MOST + 2), list(milliseconds), list(milliseconds.values()))
    return Costs(draft / 1000, tuple((verify / 1000).tolist()))


LAPTOP_8_CORES = _curve(4.0, {1: 30, 2: 32, 4: 36, 8: 48, 16: 80})
"""Assumed, not measured: eight cores and a 600 MB base. One token waits for memory (20 GB/s), and the cores can do
the arithmetic of about four in that time; from then on each token adds 3 to 4 ms. The draft has a tenth of the size.
"""
GPU = _curve(1.5, {1: 10, 16: 11})
"""Assumed, not measured: a graphics card and a base of some gigabytes. Reading the weights takes 10 ms whatever the
tokens, up to 16 of which add a tenth. The draft is small, and its time is mostly that of starting kernels.
"""


@dataclass(frozen=True, slots=True)
class OnPaper:
    """What the controller would settle on for one request alone."""

    acceptance: float
    k: int
    speedup: float


def on_paper(costs: Costs, acceptances: Sequence[float] = (0.3, 0.6, 0.75, 0.9)) -> list[OnPaper]:
    """Drafted tokens and speed-up over plain decoding for given acceptances, one row each."""
    rows = []
    for acceptance in acceptances:
        k = best_k(acceptance, costs.draft, costs.verify)
        rows.append(OnPaper(acceptance, k, expected_speedup(acceptance, k, costs.draft, costs.verify)))
    return rows
