"""Latency of forward passes: measured once per machine and model and stored on disk, or assumed (SPEC E2)."""

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
from cogumi.engine.llama.speculative.latency_model import MAX_DRAFT, LatencyCurve
from cogumi.engine.llama.speculative.speculation import best_k, expected_speedup

Key = Mapping[str, str | int]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


SHORT_PASS = 0.005
"""Seconds of a one-token pass below which every size is measured."""


def pass_seconds(model: Model, most: int, threads: int) -> tuple[float, ...]:
    """Seconds of passes over 1, 2, .. `most` tokens of one sequence, each the minimum of several runs.

    Slow passes are measured at 1, 2, 4, 8, .. tokens only, with linear interpolation.
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
        short = one < SHORT_PASS
        sizes = [n for n in range(1, most + 1) if short or n == most or n & (n - 1) == 0]
        known = [fastest(n, 5 if short else 2) for n in sizes]
    finally:
        context.close()
    return tuple(np.interp(range(1, most + 1), sizes, np.maximum.accumulate(known)).tolist())


class StoredLatency(BaseModel):
    """Content of a measurement file; `key` identifies machine and models."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: dict[str, str | int]
    draft: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verify: Annotated[tuple[Seconds, ...], Field(min_length=1)]


def stored_latency(measure: Callable[[], LatencyCurve], key: Key) -> LatencyCurve:
    """The latency stored under `key`, else the result of `measure`, which is then stored.

    An unreadable file, or one with another key, is replaced; a failure to write is ignored.
    """
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"costs-{name}.json"
    try:
        stored = StoredLatency.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        stored = None
    if stored and stored.key == dict(key):
        return LatencyCurve(stored.draft, stored.verify)
    latency = measure()
    with suppress(OSError):
        write_json(path, {"key": key, "draft": latency.draft, "verify": latency.verify})
    return latency


def machine_key() -> dict[str, str | int]:
    """What the latency depends on besides the model: processor model, processor count, llama-cpp-python version."""
    return {
        "cpu": _cpu(),
        "processors": usable_threads(),
        "llama-cpp-python": metadata.version("llama-cpp-python"),
    }


def file_key(path: Path) -> dict[str, str | int]:
    """Identifies a model file without reading it. Raises `OSError` if it does not exist."""
    stat = path.stat()
    return {"name": path.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _curve(draft: float, milliseconds: Mapping[int, float]) -> LatencyCurve:
    """A latency curve through a few points (tokens: milliseconds), linear between them; `draft` in milliseconds."""
    verify = np.interp(range(1, MAX_DRAFT + 2), list(milliseconds), list(milliseconds.values()))
    return LatencyCurve(draft / 1000, tuple((verify / 1000).tolist()))


LAPTOP_8_CORES = _curve(4.0, {1: 30, 2: 32, 4: 36, 8: 48, 16: 80})
"""Assumed, not measured: eight cores and a 600 MB base. One token is limited by memory bandwidth (20 GB/s); about four
tokens can be computed in that time, each further token adds 3 to 4 ms. The draft has a tenth of the size.
"""
GPU = _curve(1.5, {1: 10, 16: 11})
"""Assumed, not measured: a GPU and a base of a few gigabytes. Reading the weights takes 10 ms independent of the number
of tokens; 16 tokens add a tenth. The draft is small, and its time is dominated by kernel launches.
"""


@dataclass(frozen=True, slots=True)
class SpeedupEstimate:
    """Draft length and speed-up that the controller would choose for a single request."""

    acceptance: float
    k: int
    speedup: float


def estimate_speedups(
    latency: LatencyCurve, acceptances: Sequence[float] = (0.3, 0.6, 0.75, 0.9)
) -> list[SpeedupEstimate]:
    """Draft length and speed-up over plain decoding for given acceptance rates, one row each."""
    rows = []
    for acceptance in acceptances:
        k = best_k(acceptance, latency.draft, latency.verify)
        rows.append(SpeedupEstimate(acceptance, k, expected_speedup(acceptance, k, latency.draft, latency.verify)))
    return rows
