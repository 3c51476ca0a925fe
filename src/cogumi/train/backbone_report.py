"""Report of stage `backbone`: report.md and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogumi.core.files import write_text
from cogumi.core.pictures import new_figure


def report(metrics: Mapping[str, Any], out: Path) -> None:
    """Write report.md and backbone.png from the stage's metrics."""
    size, ranks, kept = metrics["bytes"], metrics["ranks"], metrics["kept"]
    rows = [
        f"| {name} | {d['base']['loss']:.3f} | {d['before']['loss']:.3f} | {d['untrained']['loss']:.3f} | "
        f"{d['after']['loss']:.3f} | {d['loss_rise']:+.1%} | {d['before']['exact']:.1%} | {d['after']['exact']:.1%} | "
        f"{100 * -d['exact_lost']:+.1f} | {metrics['clusters'][name]} |"
        for name, d in metrics["domains"].items()
    ]
    many = "more than 15 domains" if metrics["many_domains"] else "15 domains or fewer: full adapters are still simple"
    directions = ", ".join(f"{share:.1%}" for share in metrics["explained"])
    text = [
        "# One shared adapter and a head per domain",
        "",
        f"{size['before']:,} bytes of adapters became {size['after']:,} ({size['after'] / size['before']:.0%}):",
        f"a shared update of rank {ranks['shared']}, heads of rank {ranks['head']}. There are {many}.",
        "",
        f"The principal directions of the given updates explain {directions} of their squared norm. Before training,",
        f"the shared update explains {kept['by_shared']:.1%} of it, together with the heads {kept['by_both']:.1%}.",
        "",
        "Loss (nats per token) and exact answers on the selection questions of each domain. Goal: at most 1% lost.",
        "",
        "| adapter | base | full | factored | trained | loss | exact, full | exact, trained | points | cluster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "![similarity of the adapters, and their losses](backbone.png)",
    ]
    write_text(out / "report.md", "\n".join(text) + "\n")
    _picture(metrics, out / "backbone.png")


def _picture(metrics: Mapping[str, Any], path: Path) -> None:
    """Cosines of updates, cosines of their effects on hidden states, and losses before and after."""
    names = list(metrics["domains"])
    figure, axes = new_figure(3, height=4.5)
    for axis, (kind, values) in zip(axes, metrics["cosines"].items(), strict=False):
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"cosines of {kind}")
    figure.colorbar(image, ax=axes[1])
    states = {"base": "base", "before": "full adapter", "untrained": "factored", "after": "trained"}
    for i, (key, label) in enumerate(states.items()):
        places = [k + (i - 1.5) * 0.2 for k in range(len(names))]
        axes[2].bar(places, [metrics["domains"][name][key]["loss"] for name in names], 0.2, label=label)
    axes[2].set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes[2].set(ylabel="nats per token")
    axes[2].legend()
    figure.savefig(path)
