"""Report of a grid of prunings: a table and a picture (SPEC D2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cogumi.core.files import write_text
from cogumi.core.pictures import new_figure

Results: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Figures of every candidate by name, as under `grid` in the stage's metrics."""


def write_report(out: Path, results: Results, chosen: str, dense: Mapping[str, float]) -> None:
    """`report.md` and `grid.png` in `out`; `chosen` is a name among the `results`."""
    head = ["candidate", "zero", "perplexity", "exact", "zstd bytes", "of dense", "quality", "score", "Pareto"]
    lines = [
        "# Prunings tried",
        "",
        "Judged on the selection split. quality = the mean of perplexity(dense) / perplexity and exact / exact(dense);",
        "score = quality - zstd bytes / zstd bytes(dense). On the Pareto front no other is as good and as small.",
        "",
        _row(head),
        _row("---" for _ in head),
        _row(
            [
                "dense",
                "",
                f"{dense['perplexity']:.3f}",
                f"{dense['exact']:.1%}",
                f"{dense['zstd_bytes']:,}",
                "100%",
                "1.000",
                "0.000",
                "",
            ]
        ),
    ]
    for name, found in sorted(results.items(), key=lambda item: -item[1]["score"]):
        lines.append(
            _row(
                [
                    f"**{name}** (chosen)" if name == chosen else name,
                    f"{found['sparsity']:.1%}",
                    f"{found['pruned']['perplexity']:.3f}",
                    f"{found['pruned']['exact']:.1%}",
                    f"{found['zstd_bytes']:,}",
                    f"{found['size']:.1%}",
                    f"{found['quality']:.3f}",
                    f"{found['score']:.3f}",
                    "yes" if found["front"] else "",
                ]
            )
        )
    write_text(out / "report.md", "\n".join([*lines, "", "![sparsity against perplexity](grid.png)", ""]))
    _picture(out / "grid.png", results, chosen, dense)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _picture(path: Path, results: Results, chosen: str, dense: Mapping[str, float]) -> None:
    """Selection perplexity against the remaining size, a line per method; a ring marks the chosen candidate."""
    figure, (axes,) = new_figure(width=6)
    for method in dict.fromkeys(found["method"] for found in results.values()):
        same = [found for found in results.values() if found["method"] == method]
        points = sorted((found["size"], found["pruned"]["perplexity"], found["sparsity"]) for found in same)
        axes.plot([size for size, _, _ in points], [y for _, y, _ in points], "o-", label=method)
        for size, y, sparsity in points:
            axes.annotate(f"{sparsity:.0%}", (size, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    best = results[chosen]
    axes.plot(best["size"], best["pruned"]["perplexity"], "o", ms=14, mfc="none", mec="black", label="chosen")
    axes.axhline(dense["perplexity"], color="0.6", linestyle="--", label="dense")
    axes.set(xlabel="zstd bytes, share of the dense model's", ylabel="perplexity of selection answers")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
