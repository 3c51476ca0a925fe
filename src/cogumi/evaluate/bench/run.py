"""Run the rows of the benchmark one after the other and collect their results (SPEC H4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cogumi.bundle.format import INDEX, open_bundle
from cogumi.core.environment import cache_folder, environment
from cogumi.core.errors import CogumiError, RequestError
from cogumi.core.packages import load
from cogumi.core.registry import nearest
from cogumi.engine.llama.binding.model import load_tokenizer
from cogumi.engine.llama.engine import default_threads
from cogumi.engine.llama.speculative.latency_measurement import machine_key
from cogumi.evaluate.bench import adapter_speed, bundle_sizes, memory_use, speed, unpacking
from cogumi.evaluate.bench.busy_machine import busy
from cogumi.evaluate.bench.cascade_price import price
from cogumi.evaluate.bench.paired import Row, Setup, ordinary
from cogumi.evaluate.bench.roofline import Memory, roofline
from cogumi.evaluate.bench.soak import soak
from cogumi.evaluate.bench.synthetic_models import SHAPES, chain, make_model

ACCEPT = (0.3, 0.6, 0.75, 0.9)
"""Acceptance rates of the synthetic drafts."""
BUNDLES = ("q4_k_m", "iq4_xs")
"""File types of the base in the rows about bundles."""
NAMED_ONLY = (
    "concurrency_16",
    "start",
    *(f"bundle_1b_{type}" for type in BUNDLES),
    "bundle_mobile",
    "unpack",
    "adapter_training",
    "price",
    "soak",
)
"""Rows that take long or have no baseline; they run only if requested by name."""

Measure = Callable[[Setup], Row]


class Progress(Protocol):
    """Callbacks for the progress of a benchmark."""

    def started(self, name: str, number: int, of: int) -> None:
        """A row starts."""

    def advanced(self, share: float) -> None:
        """This share of the row is done."""


def measures(accept: Sequence[float] = ACCEPT) -> dict[str, Measure]:
    """Every row by name."""
    found: dict[str, Measure] = {
        "roofline": roofline,
        "single_stream": speed.single_stream,
        "concurrency_8": partial(speed.concurrency, users=8),
        "busy": busy,
    }
    found |= {f"speculation_{a:g}": partial(speed.speculation, accept=a) for a in accept}
    return found | {
        "on_paper": partial(speed.on_paper, accept=accept),
        "ngram": speed.ngram,
        "kv_q8_0": partial(memory_use.kv_cache, type="q8_0", goal=0.55),
        "kv_q4_0": partial(memory_use.kv_cache, type="q4_0", goal=0.29),
        "adapter_warm": adapter_speed.adapter_warm,
        "adapter_cold": adapter_speed.adapter_cold,
        "head_adaptation": adapter_speed.head_adaptation,
        "prefill_ahead": speed.prefill_ahead,
        "concurrency_16": partial(speed.concurrency, users=16),
        "start": memory_use.start,
        "unpack": unpacking.unpack,
        **{f"bundle_1b_{type}": partial(bundle_sizes.bundle_1b, type=type) for type in BUNDLES},
        "bundle_mobile": bundle_sizes.bundle_mobile,
        "adapter_training": _adapter_training,
        "price": price,
        "soak": soak,
    }


def _adapter_training(setup: Setup) -> Row:
    """The row of that name; its module needs torch, the others do not."""
    found: Row = load("cogumi.evaluate.bench.adapter_training", "the row adapter_training").adapter_training(setup)
    return found


def chosen(only: Sequence[str], accept: Sequence[float]) -> dict[str, Measure]:
    """The requested rows, by default all except `NAMED_ONLY`; `RequestError` for an unknown name."""
    known = measures(accept)
    for name in only:
        if name not in known:
            raise RequestError(f"there is no row {name!r}; {nearest(name, known)}")
    return {name: known[name] for name in known if name in only or (not only and name not in NAMED_ONLY)}


def run(
    progress: Progress,
    *,
    only: Sequence[str] = (),
    shape: str = "1b",
    model: Path | None = None,
    accept: Sequence[float] = ACCEPT,
    threads: int | None = None,
    text: Path | None = None,
    minutes: float = 1.0,
) -> dict[str, Any]:
    """Measure and return `{machine, bandwidth_gb_s, bandwidth_basis, model, model_bytes, threads, rows}`.

    A row that fails has its `error` in the conditions; the other rows are measured nevertheless.
    """
    rows = chosen(only, accept)
    if shape not in SHAPES:
        raise RequestError(f"there is no shape {shape!r}; {nearest(shape, SHAPES)}")
    if text and not model:
        raise RequestError("the perplexity of synthetic weights is meaningless; give --model with --text")
    folder = cache_folder() / "shapes"
    bundle = model if model and (model / INDEX).is_file() else None
    file = open_bundle(bundle).base if bundle else model or make_model(folder, shape)
    tokenizer = load_tokenizer(file)
    threads = threads or default_threads(file)
    bandwidth = _bandwidth(threads)
    setup = Setup(
        model=file,
        shape=None if model else shape,
        folder=folder,
        threads=threads,
        words=ordinary(tokenizer) if model else chain(tokenizer.size),
        bundle=bundle,
        text=text.read_text("utf-8") if text else None,
        minutes=minutes,
        tick=progress.advanced,
    )
    found = []
    for number, (name, measure) in enumerate(rows.items(), 1):
        progress.started(name, number, len(rows))
        found.append(asdict(_measured(name, measure, setup)))
    bandwidth, basis = max(bandwidth, _bandwidth(threads)), "best of two measurements, before and after the rows"
    for row in found:
        if row["name"] == "roofline" and row["ratio"] is not None:  # one figure for the title and its row
            bandwidth, basis = 1e9 * row["conditions"]["bandwidth_gb_s"], "median over the rounds of row roofline"
    return {
        "machine": environment(threads) | {"cpu": machine_key()["cpu"]},
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "bandwidth_basis": basis,
        "model": model.name if model else shape,
        "model_bytes": file.stat().st_size,
        "threads": threads,
        "rows": found,
    }


def _bandwidth(threads: int) -> float:
    with closing(Memory(threads)) as arrays:
        return arrays.bandwidth()


def _measured(name: str, measure: Measure, setup: Setup) -> Row:
    try:
        return measure(setup)
    except CogumiError as error:
        return Row(name, None, None, None, "", {"error": str(error)})
