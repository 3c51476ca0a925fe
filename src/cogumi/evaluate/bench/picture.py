"""Picture of a benchmark: ratios of all rows, and the roofline of tokens per second against memory bandwidth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FORMATS = (".pdf", ".png", ".svg")
GOOD, BAD, PLAIN = "#2a7f62", "#c0504d", "#5b7db1"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Write the picture of a benchmark's results (see `run.run`) to `path`; its suffix determines the format."""
    rows = [row for row in found["rows"] if row["ratio"] is not None]
    figure = Figure(figsize=(13, max(3.5, 1.2 + 0.38 * len(rows))), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    ratios, roof = figure.subplots(1, 2, width_ratios=[3, 2])
    _ratios(ratios, rows)
    _roof(roof, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _ratios(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One bar per row from 1 to its ratio, on a logarithmic scale; dots mark the goal, a line the spread."""
    ends = [0.5, 2.0]
    for i, row in enumerate(rows):
        conditions = row["conditions"]
        low, high = conditions.get("spread", [row["ratio"]] * 2)
        color = {True: GOOD, False: BAD, None: PLAIN}[conditions.get("met")]
        axis.barh(i, row["ratio"] - 1, left=1, height=0.6, color=color)
        axis.plot([low, high], [i, i], color="black", linewidth=1.5)
        if conditions.get("goal", "").startswith((">= ", "<= ")):
            bound = float(conditions["goal"][3:])
            axis.plot([bound, bound], [i - 0.4, i + 0.4], color="black", linestyle=":", linewidth=2)
        end = max(row["ratio"], high, 1.05)
        axis.annotate(f"{row['ratio']:.3g}", (end, i), (5, 0), textcoords="offset points", va="center")
        ends += [low, high]
    left, right = min(ends) / 1.3, max(ends) * 1.6
    shown = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if left < tick < right]
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_title("with / without (line: spread, dots: goal, green: met, red: missed, blue: no goal)", fontsize=10)


def _roof(axis: Any, found: Mapping[str, Any]) -> None:
    """Tokens per second that bandwidth allows by model size, and the measured ones."""
    bandwidth = found["bandwidth_gb_s"]
    rows = {row["name"]: row for row in found["rows"] if row["ratio"] is not None}
    size = found["model_bytes"] / 1e9
    if one := rows.get("roofline"):
        size = one["conditions"]["bytes_per_token"] / 1e9
        axis.plot([size, size], [one["value"], bandwidth / size], color="0.6", linestyle=":")
        axis.plot(size, one["value"], "o", color="black", label=f"one request, {one['ratio']:.0%} of the limit")
    for name in [name for name in rows if name.startswith("concurrency")]:
        users = rows[name]["conditions"]["users"]
        axis.plot(size, rows[name]["value"], "s", color=PLAIN, label=f"{users} concurrent requests")
        axis.plot(size, rows[name]["baseline"], "x", color=BAD, label=f"{users} through llama.cpp's server")
    sizes = np.geomspace(size / 4, size * 4, 50)
    axis.loglog(sizes, bandwidth / sizes, color="black", label=f"memory bandwidth, {bandwidth:.1f} GB/s")
    ticks = size * np.array([0.25, 0.5, 1, 2, 4])
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_yticks(bandwidth / ticks, [f"{bandwidth / tick:,.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(color="0.9")
    axis.set(xlabel="GB read per step", ylabel="tokens/s")
    axis.set_title(f"roofline: {found['model']}, threads: {found['threads']}", fontsize=10)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8, frameon=False)
