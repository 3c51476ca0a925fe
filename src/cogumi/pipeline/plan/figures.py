"""A plan of sizes as figures under plain names, and as tables to read (SPEC D1)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogumi.compress.gguf.planned_files import Weights
from cogumi.core.amounts import size
from cogumi.core.environment import usable_threads
from cogumi.core.errors import BundleError
from cogumi.core.footprint import BF16, FP32
from cogumi.pipeline.plan.bundle_memory import bytes_per_token
from cogumi.pipeline.plan.refusal import refusal
from cogumi.pipeline.plan.routes import Asked, Budget, Route

if TYPE_CHECKING:
    from cogumi.evaluate.bench.run import Progress

THREADS = 8
"""Threads that memory bandwidth is measured with at most: so many take all there is of it, and 256 MB each."""
ORDER = "vocabulary, adapters, type of the weights, layers and neurons"
"""What routes change, from the least expected loss to the largest."""
CEILING = (
    "tokens/s are the ceiling that memory bandwidth sets; the runtime reaches about 0.4 to 0.65 of it "
    "(measure it: cogumi bench --only roofline)"
)
FILE_COLUMNS = ("file", "bytes", "share", "packed by zstd, estimated")
BESIDE_COLUMNS = ("step", "bytes", "packed by zstd, estimated")
MEMORY = {
    "weights": "weights, mapped from their files",
    "repacked": "the same once more where llama.cpp repacks them",
    "cache": "key-value caches",
    "buffers": "compute buffers",
    "adapters": "adapters with their caches",
    "nets": "small nets",
    "program": "Python and libraries",
}


def measured_bandwidth() -> float:
    """Bytes per second that this machine reads from memory; takes a second."""
    from cogumi.evaluate.bench.roofline import Memory

    with closing(Memory(min(usable_threads(), THREADS))) as arrays:
        return arrays.bandwidth()


def measured(path: Path, asked: Asked, progress: Progress) -> dict[str, Any]:
    """A GGUF file as it is beside what was planned of it: its bytes, and the tokens per second that it decodes with,
    beside the ceiling by the bandwidth measured in turns with it.
    """
    from cogumi.evaluate.bench.run import run

    (row,) = run(progress, only=("roofline",), model=path)["rows"]
    if row["ratio"] is None:
        raise BundleError(f"the speed of {path} could not be measured: {row['conditions']['error']}")
    return {
        "bytes": path.stat().st_size,
        "planned_bytes": asked.parts.base.file.bytes,
        "tokens_per_second": row["value"],
        "tokens_per_second_at_most": row["baseline"],
        "share_of_ceiling": row["ratio"],
        "bytes_per_token": row["conditions"]["bytes_per_token"],
        "bandwidth_gb_s": row["conditions"]["bandwidth_gb_s"],
    }


def figures(asked: Asked) -> dict[str, Any]:
    """All there is to know of sizes, JSON-able: the bundle as asked, the routes, what changes make it fit."""
    route = asked.route()
    shape = route.parts.base.shape
    fitting = asked.fitting if route.missed else route
    return {
        "budget": asdict(asked.budget),
        "serving": asdict(asked.serving),
        "bandwidth_bytes_per_second": asked.bandwidth,
        "parameters": shape.parameters,
        "fp32_bytes": FP32 * shape.parameters,
        "bf16_bytes": BF16 * shape.parameters,
        "files": dict(route.parts.files),
        "memory": asdict(route.memory),
        "asked": _row(route),
        "routes": [_row(one) for one in asked.table()],
        "order_of_changes": ORDER,
        "smallest_change": _row(fitting) if fitting else None,
        "refusal": None if fitting else refusal(asked),
    }


def _row(route: Route) -> dict[str, Any]:
    parts = route.parts
    base, shape, ceiling = parts.base, parts.base.shape, route.ceiling
    return {
        "changes": list(route.changes),
        "layers": shape.layers,
        "feed_forward": shape.feed_forward,
        "vocabulary": shape.vocabulary,
        "type": base.type,
        "parameters": shape.parameters,
        "base_bytes": base.file.bytes,
        "bits_per_weight": round(8 * base.file.bytes / shape.parameters, 3),
        "bundle_bytes": parts.bytes,
        "packed_bytes_estimated": sum(parts.packed.values()),
        "ram_bytes": route.ram,
        "repack": route.repack,
        "bytes_per_token": bytes_per_token(parts, route.serving),
        "tokens_per_second_at_most": None if ceiling is None else round(ceiling, 2),
        "fits": not route.missed,
        "missed": list(route.missed),
    }


def file_table(asked: Asked) -> list[list[str]]:
    """A row of `FILE_COLUMNS` for each file of the bundle as asked, and one for all."""
    parts = asked.parts
    rows = [
        [name, f"{bytes:,}", f"{bytes / parts.bytes:.1%}", size(parts.packed[name])]
        for name, bytes in parts.files.items()
    ]
    return [*rows, ["all", f"{parts.bytes:,}", "", size(sum(parts.packed.values()))]]


def beside_table(models: Mapping[str, Weights]) -> list[list[str]]:
    """A row of `BESIDE_COLUMNS` for each model that is in no bundle, by step."""
    return [[name, f"{one.file.bytes:,}", size(one.file.packed)] for name, one in models.items()]


def memory_table(asked: Asked) -> list[list[str]]:
    """What the bundle as asked takes in memory, a row each."""
    route = asked.route()
    said = asdict(route.memory)
    rows = [
        [text, size(said[name])] for name, text in MEMORY.items() if said[name] and (name != "repacked" or route.repack)
    ]
    return [*rows, ["all", size(route.ram)]]


def route_table(asked: Asked) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: a row for every depth and vocabulary, a column for every type."""
    routes = asked.table()
    types = list(dict.fromkeys(route.parts.base.type for route in routes))
    rows = []
    for (layers, ids), some in groupby(
        routes, key=lambda r: (r.parts.base.shape.layers, r.parts.base.shape.vocabulary)
    ):
        rows.append([str(layers), f"{ids:,}", *map(_cell, some)])
    by = ", its speed by the ceiling" if asked.budget.tokens_per_second else ""
    said = f", + where it fits{by}" if asked.budget != Budget() else ""
    speed = " with tokens/s at most" if asked.bandwidth else ""
    return f"routes: MB of the bundle{speed}{said}", ["layers", "ids", *types], rows


def _cell(route: Route) -> str:
    megabytes = route.parts.bytes / 1e6
    speed = f" {route.ceiling:.0f}/s" if route.ceiling else ""
    fits = " +" if route.budget != Budget() and not route.missed else ""
    return f"{megabytes:,.{0 if megabytes >= 100 else 1}f}{speed}{fits}"


def lines(asked: Asked) -> list[str]:
    """What to know beside the tables: whether it fits, why not, and the smallest change that makes it fit."""
    route = asked.route()
    base, n = route.parts.base, route.parts.base.shape.parameters
    found = [f"{asked.parts.name}: {_summary(route)}; {8 * base.file.bytes / n:.2f} bits for each of {n:,} weights"]
    if asked.serving.context == route.parts.base.shape.context:
        found.append(f"planned for a context of {asked.serving.context:,} tokens: the base was made for no more")
    if asked.budget == Budget():
        return found
    if not route.missed:
        by = ", its speed by the ceiling" if asked.budget.tokens_per_second else ""
        return [*found, f"it fits as it is{by}", *_caveat(asked)]
    found += _caveat(asked)
    found.append(f"it does not fit: {', '.join(route.missed)}")
    change = asked.fitting
    if change is None:
        return found
    found.append(f"changes that cost least are tried first: {ORDER}")
    return [*found, f"smallest change that fits: {', '.join(change.changes)}: {_summary(change)}"]


def _caveat(asked: Asked) -> list[str]:
    """What a speed that was asked for is compared with."""
    return [CEILING] if asked.budget.tokens_per_second else []


def said(measured: Mapping[str, Any]) -> str:
    """The measurements of a file in a line."""
    now, most, share = (
        measured[name] for name in ("tokens_per_second", "tokens_per_second_at_most", "share_of_ceiling")
    )
    sizes = f"{measured['bytes']:,} bytes, planned {measured['planned_bytes']:,}"
    return f"measured: {sizes}; {now:.1f} tokens/s, at most {most:.1f} ({share:.0%} of it)"


def _summary(route: Route) -> str:
    speed = f", at most {route.ceiling:.1f} tokens/s" if route.ceiling else ""
    repacked = "" if route.repack or not route.memory.repacked else " without repacking (open with --no-repack)"
    return f"{size(route.parts.bytes)} on disk, {size(route.ram)} in memory{repacked}{speed}"
