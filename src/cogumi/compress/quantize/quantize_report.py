"""Report of stages `awq` and `gptq`: report.md and a picture of the sensitivity of each linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogumi.core.files import write_text
from cogumi.core.pictures import new_figure

MARKS = {"finer": "+", "middle": "", "coarser": "-"}


def report(metrics: Mapping[str, Any], out: Path) -> None:
    """Write report.md and sensitivity.png from a stage's metrics."""
    models = {
        "original": metrics["before"],
        "rounded": metrics["rounded"],
        "rounded to nearest (no calibration)": metrics["rounded_plainly"],
        "as written": metrics["written"],
    }
    rows = [
        f"| {name} | {m['nats']:.4f} | {m['perplexity']:.3f} | {m['divergence']:.4f} | {m['exact']:.1%} |"
        for name, m in models.items()
    ]
    domains = [
        f"| {name} | {d['before']:.1%} | {d['after']:.1%} | {_share(d['ratio'])} |"
        for name, d in metrics["domains"].items()
    ]
    attempts = [
        f"| {a['group']} | {a['finer']:.0%} | {a['coarser']:.0%} | {a['bits_per_weight']:.2f} | {a['nats']:.4f} | "
        f"{_share(a['quality_ratio'])} | {_share(a['exact_ratio'])} | {'yes' if a['enough'] else 'no'} |"
        for a in metrics["attempts"]
    ]
    text = [
        f"# {metrics['bits_per_weight']:.2f} bits a weight",
        "",
        f"Left on the selection split: {_share(metrics['quality_ratio'])} (perplexity) and",
        f"{_share(metrics['exact_ratio'])} (exact answers).",
        f"Calibrated on {metrics['rows']} rows, {metrics['tokens']:,} tokens.",
        "",
        "| model | nats per token | perplexity | divergence | exact |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        "| domain | exact before | rounded | ratio |",
        "| --- | --- | --- | --- |",
        *domains,
        "",
        "Settings, from the strongest compression to the weakest:",
        "",
        "| group | finer | coarser | bits | nats | perplexity left | exact left | enough |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *attempts,
        "",
        "Sensitivity: divergence of the model's answers, in thousandths of a nat per token, if this linear layer alone",
        "is rounded to four bits. + is rounded finer, - coarser.",
        "",
        *_table(metrics["sensitivity"]),
        "",
        "![the same as a picture](sensitivity.png)",
    ]
    write_text(out / "report.md", "\n".join(text) + "\n")
    _picture(metrics["sensitivity"], out / "sensitivity.png")


def _share(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"


def _grid(sensitivity: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], Any]]:
    """Layers, kinds, and the figures of each (layer, kind), from names such as `model.layers.0.mlp.up_proj`."""
    cells = {(name.split(".")[2], name.split(".")[-1]): found for name, found in sensitivity.items()}
    layers, kinds = zip(*cells, strict=True)
    return list(dict.fromkeys(layers)), list(dict.fromkeys(kinds)), cells


def _table(sensitivity: Mapping[str, Mapping[str, Any]]) -> list[str]:
    layers, kinds, cells = _grid(sensitivity)
    lines = [f"| layer | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for layer in layers:
        found = [cells[layer, kind] for kind in kinds]
        values = " | ".join(f"{1000 * c['divergence']:.2f} {MARKS[c['level']]}".rstrip() for c in found)
        lines.append(f"| {layer} | {values} |")
    return lines


def _picture(sensitivity: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    layers, kinds, cells = _grid(sensitivity)
    figure, (axes,) = new_figure(width=6, height=max(3.0, 1 + 0.25 * len(layers)))
    image = axes.imshow(
        [[1000 * cells[layer, kind]["divergence"] for kind in kinds] for layer in layers], aspect="auto"
    )
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            axes.text(column, row, MARKS[cells[layer, kind]["level"]], ha="center", va="center", color="white")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set(ylabel="layer")
    figure.colorbar(image, label="thousandths of a nat per token")
    figure.savefig(path)
