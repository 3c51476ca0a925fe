"""Report of stage `shrink`: report.md and the learning curves of the shrunk model and its control."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogumi.core.files import write_text
from cogumi.train.curves import curves_picture

MODELS = {
    "before": "original",
    "cut": "cut, not trained yet",
    "after": "cut and trained",
    "control": "same shape and budget, from scratch",
}
SIZES = ("layers", "hidden", "feed_forward", "heads", "kv_heads")


def report(metrics: Mapping[str, Any], out: Path) -> None:
    """Write report.md from the stage's metrics, and curves.png if anything was trained."""
    shape, size = metrics["shape"], metrics["parameters"]
    shown = ["before", "cut", *metrics["curve"]]
    found = [(label, metrics[name]) for name, label in MODELS.items() if name in shown]
    kept, without = metrics["layers"]["kept"], metrics["layers"]["nats_without"]
    text = [
        f"# {size['before']:,} weights cut to {size['after']:,} ({size['after'] / size['before']:.0%})",
        "",
        "| | before | after |",
        "| --- | --- | --- |",
        *(f"| {name} | {shape['before'][name]} | {shape['after'][name]} |" for name in SIZES),
        "",
        "On the selection split:",
        "",
        "| model | nats per token | perplexity | exact |",
        "| --- | --- | --- | --- |",
        *(f"| {label} | {m['nats']:.4f} | {m['perplexity']:.3f} | {m['exact']:.1%} |" for label, m in found),
    ]
    if without:
        text += [
            "",
            f"Loss without each layer, on {metrics['calibration']['tokens']:,} calibration tokens:",
            "",
            "| layer | nats per token without it | |",
            "| --- | --- | --- |",
            *(f"| {i} | {nats:.4f} | {'' if i in kept else 'left out'} |" for i, nats in enumerate(without)),
        ]
    if metrics["curve"]:
        _curves(metrics, out / "curves.png")
        text += ["", "![selection loss against steps](curves.png)"]
    write_text(out / "report.md", "\n".join(text) + "\n")


def _curves(metrics: Mapping[str, Any], path: Path) -> None:
    """Selection loss of the shrunk model and of its control against steps, and that of the original model."""
    points = [
        (step, {MODELS[name]: figures["loss"]})
        for name, run in metrics["curve"].items()
        for step, figures in run["selection"]
    ]
    last = max(step for step, _ in points)
    points += [(step, {MODELS["before"]: metrics["before"]["nats"]}) for step in (0, last)]
    points.insert(0, (0, {MODELS["after"]: metrics["cut"]["nats"]}))
    names = [MODELS[name] for name in ("before", *metrics["curve"])]
    curves_picture(path, points, names, "nats per answer token, selection")
