"""A plan of sizes as a JSON-compatible dictionary and as tables (SPEC D1)."""

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
from cogumi.pipeline.plan.routes import Budget, Route, RouteSearch

if TYPE_CHECKING:
    from cogumi.evaluate.bench.run import Progress

THREADS = 8
"""Maximum number of threads for measuring memory bandwidth: they saturate it, and each uses 256 MB."""
ORDER = "vocabulary, adapters, type of the weights, layers and neurons"
"""What routes change, in order of expected quality loss, smallest first."""
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
    """Memory bandwidth of this machine in bytes per second; measuring takes a second."""
    from cogumi.evaluate.bench.roofline import Memory

    with closing(Memory(min(usable_threads(), THREADS))) as arrays:
        return arrays.bandwidth()


def measured(path: Path, search: RouteSearch, progress: Progress) -> dict[str, Any]:
    """Measurements of a GGUF file beside the planned figures: its size, and its decoding speed beside the upper bound
    from memory bandwidth, measured alternately.
    """
    from cogumi.evaluate.bench.run import run

    (row,) = run(progress, only=("roofline",), model=path)["rows"]
    if row["ratio"] is None:
        raise BundleError(f"the speed of {path} could not be measured: {row['conditions']['error']}")
    return {
        "bytes": path.stat().st_size,
        "planned_bytes": search.parts.base.file.bytes,
        "tokens_per_second": row["value"],
        "tokens_per_second_at_most": row["baseline"],
        "share_of_ceiling": row["ratio"],
        "bytes_per_token": row["conditions"]["bytes_per_token"],
        "bandwidth_gb_s": row["conditions"]["bandwidth_gb_s"],
    }


def figures(search: RouteSearch) -> dict[str, Any]:
    """All figures about sizes: the requested bundle, the routes, and the smallest change that makes it fit."""
    route = search.route()
    shape = route.parts.base.shape
    fitting = search.fitting if route.missed else route
    return {
        "budget": asdict(search.budget),
        "serving": asdict(search.serving),
        "bandwidth_bytes_per_second": search.bandwidth,
        "share_of_ceiling": search.reached,
        "share_measured": search.measured,
        "parameters": shape.parameters,
        "fp32_bytes": FP32 * shape.parameters,
        "bf16_bytes": BF16 * shape.parameters,
        "files": dict(route.parts.files),
        "memory": asdict(route.memory),
        "asked": _row(route),
        "routes": [_row(one) for one in search.table()],
        "order_of_changes": ORDER,
        "smallest_change": _row(fitting) if fitting else None,
        "refusal": None if fitting else refusal(search),
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
        "tokens_per_second": None if route.speed is None else round(route.speed, 2),
        "tokens_per_second_at_most": None if ceiling is None else round(ceiling, 2),
        "fits": not route.missed,
        "missed": list(route.missed),
    }


def file_table(search: RouteSearch) -> list[list[str]]:
    """A row of `FILE_COLUMNS` for each file of the requested bundle, and one for the sum."""
    parts = search.parts
    rows = [
        [name, f"{bytes:,}", f"{bytes / parts.bytes:.1%}", size(parts.packed[name])]
        for name, bytes in parts.files.items()
    ]
    return [*rows, ["all", f"{parts.bytes:,}", "", size(sum(parts.packed.values()))]]


def beside_table(models: Mapping[str, Weights]) -> list[list[str]]:
    """A row of `BESIDE_COLUMNS` for each model outside the bundle."""
    return [[name, f"{one.file.bytes:,}", size(one.file.packed)] for name, one in models.items()]


def memory_table(search: RouteSearch) -> list[list[str]]:
    """A row for each part of the memory of the requested bundle."""
    route = search.route()
    sizes = asdict(route.memory)
    rows = [
        [text, size(sizes[name])]
        for name, text in MEMORY.items()
        if sizes[name] and (name != "repacked" or route.repack)
    ]
    return [*rows, ["all", size(route.ram)]]


def route_table(search: RouteSearch) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: a row for every depth and vocabulary, a column for every type."""
    routes = search.table()
    types = list(dict.fromkeys(route.parts.base.type for route in routes))
    rows = []
    for (layers, ids), some in groupby(
        routes, key=lambda r: (r.parts.base.shape.layers, r.parts.base.shape.vocabulary)
    ):
        rows.append([str(layers), f"{ids:,}", *map(_cell, some)])
    legend = ", + where it fits" if search.budget != Budget() else ""
    speed = " with expected tokens/s" if search.bandwidth else ""
    return f"routes: MB of the bundle{speed}{legend}", ["layers", "ids", *types], rows


def _cell(route: Route) -> str:
    megabytes = route.parts.bytes / 1e6
    speed = f" {route.speed:.0f}/s" if route.speed else ""
    fits = " +" if route.budget != Budget() and not route.missed else ""
    return f"{megabytes:,.{0 if megabytes >= 100 else 1}f}{speed}{fits}"


def lines(search: RouteSearch) -> list[str]:
    """Lines beside the tables: whether the bundle fits, why not, and the smallest change that makes it fit."""
    route = search.route()
    base, n = route.parts.base, route.parts.base.shape.parameters
    found = [f"{search.parts.name}: {_summary(route)}; {8 * base.file.bytes / n:.2f} bits for each of {n:,} weights"]
    if search.serving.context == route.parts.base.shape.context:
        found.append(f"planned for a context of {search.serving.context:,} tokens: the maximum of the base")
    if search.budget == Budget():
        return found
    if not route.missed:
        return [*found, "it fits as it is", *_basis(search)]
    found += _basis(search)
    found.append(f"it does not fit: {', '.join(route.missed)}")
    change = search.fitting
    if change is None:
        return found
    found.append(f"changes that cost least are tried first: {ORDER}")
    return [*found, f"smallest change that fits: {', '.join(change.changes)}: {_summary(change)}"]


def _basis(search: RouteSearch) -> list[str]:
    """How the speed is computed, if the bandwidth is known."""
    if not search.bandwidth:
        return []
    share = "measured with this file" if search.measured else "usual: 40% to 65%, measure it: cogumi bench"
    above = "; above 100% the processor's cache holds a part of the model" if search.reached > 1 else ""
    speed = f"{search.bandwidth / 1e9:.1f} GB/s"
    return [f"tokens/s: {search.reached:.0%} ({share}) of what memory of {speed} allows{above}"]


def measurement_line(measured: Mapping[str, Any]) -> str:
    """The measurements of a file in one line."""
    now, most, share = (
        measured[name] for name in ("tokens_per_second", "tokens_per_second_at_most", "share_of_ceiling")
    )
    sizes = f"{measured['bytes']:,} bytes, planned {measured['planned_bytes']:,}"
    return f"measured: {sizes}; {now:.1f} tokens/s, {share:.0%} of the {most:.1f} that memory allows"


def _summary(route: Route) -> str:
    speed = f", about {route.speed:.1f} tokens/s (memory allows {route.ceiling:.1f})" if route.speed else ""
    repacked = "" if route.repack or not route.memory.repacked else " without repacking (open with --no-repack)"
    return f"{size(route.parts.bytes)} on disk, {size(route.ram)} in memory{repacked}{speed}"
