"""Plots of a build: accuracy by tier, reliability of gates, risk against coverage. Titles say how many questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.metrics import BINS, aurc, ece, reliability
from cogumi.core.pictures import legend_below, new_figure
from cogumi.data.examples import level_title

Doubles = NDArray[np.float64]
WIDE = 100
"""Positive values that span a larger factor are shown on a logarithmic axis."""


def reliability_picture(path: Path, gates: Mapping[str, tuple[Doubles, Doubles]]) -> None:
    """Share correct against P(correct) for each gate's (probabilities [n], correct [n])."""
    figure, (axes,) = new_figure(height=4.6)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (p, correct) in gates.items():
        rows = [(mean, share) for n, mean, share in reliability(p, correct) if n]
        label = f"{name}: n {len(p)}, ECE {ece(p, correct):.3f}"
        axes.plot([m for m, _ in rows], [s for _, s in rows], marker="o", markersize=4, label=label, clip_on=False)
    axes.set(xlabel=f"P(correct), {BINS} bins", ylabel="share correct", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Is P(correct) right? ({max((len(p) for p, _ in gates.values()), default=0)} questions)")
    legend_below(axes)
    figure.savefig(path)


def histogram_picture(path: Path, panels: Sequence[tuple[str, Mapping[str, Doubles], float | None]]) -> None:
    """One panel per (quantity, values of each group, threshold); values of a wide range have a logarithmic axis."""
    figure, axes = new_figure(len(panels), height=4.4)
    for axis, (label, groups, threshold) in zip(axes, panels, strict=True):
        values = np.concatenate(list(groups.values()))
        wide = len(values) > 0 and values.min() > 0 and values.max() > WIDE * values.min()
        bins = _bins(values, wide)
        for name, group in groups.items():
            axis.hist(group, bins=bins, alpha=0.6, label=f"{name} ({len(group)})")
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {_short(threshold)}")
        if wide:
            axis.set_xscale("log")
        axis.set(xlabel=label, ylabel="questions")
        axis.set_title(f"{len(values)} questions")
        legend_below(axis, columns=3)
    figure.savefig(path)


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _bins(values: Doubles, wide: bool) -> Doubles:
    """The bounds of 30 bins, of equal width on the axis."""
    if not len(values):
        return np.linspace(0, 1, 31)
    low, high = values.min(), max(values.max(), values.min() + 1e-9)
    return np.geomspace(low, high, 31) if wide else np.linspace(low, high, 31)


def accuracy_picture(path: Path, accuracy: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]) -> None:
    """Share correct of `{tier: {domain: {level: [correct, n]}}}`: one group of bars per level, one bar per tier.

    If all questions have the same level (or none), a group of bars per domain.
    """
    levels = sorted({level for cells in accuracy.values() for row in cells.values() for level in row})
    domains = sorted({domain for cells in accuracy.values() for domain in cells})
    by_level = len(levels) > 1
    groups = levels if by_level else domains
    counts = {tier: [_counts(cells, group, by_level) for group in groups] for tier, cells in accuracy.items()}
    sizes = [max(row[i][1] for row in counts.values()) for i in range(len(groups))]
    figure, (axes,) = new_figure(width=max(5.0, 1.2 * len(groups)), height=4.6)
    width = 0.8 / len(accuracy)
    for i, (tier, row) in enumerate(counts.items()):
        shares = [correct / max(n, 1) for correct, n in row]
        axes.bar(np.arange(len(groups)) + (i - len(accuracy) / 2 + 0.5) * width, shares, width, label=tier)
    names = [level_title(name) if by_level else name for name in groups]
    axes.set_xticks(range(len(groups)), [f"{name}\nn {n}" for name, n in zip(names, sizes, strict=True)])
    axes.set(ylabel="share correct", ylim=(0, 1))
    axes.set_title(f"Correct by {'level' if by_level else 'domain'} ({sum(sizes)} questions)")
    legend_below(axes, columns=4)
    figure.savefig(path)


def _counts(cells: Mapping[str, Mapping[str, Sequence[int]]], group: str, by_level: bool) -> tuple[int, int]:
    """(correct, n) of a tier on one level, or on one domain."""
    rows = [row.get(group, (0, 0)) for row in cells.values()] if by_level else list(cells.get(group, {}).values())
    return sum(pair[0] for pair in rows), sum(pair[1] for pair in rows)


def risk_picture(
    path: Path, p: Sequence[float], accepted: Sequence[bool], correct: Sequence[bool], promise: Mapping[str, Any]
) -> None:
    """Error rate against coverage, accepted answers first, then by P(correct); beside the guarantee."""
    figure, (axes,) = new_figure(height=4.6)
    order = np.lexsort((-np.array(p), ~np.array(accepted, dtype=bool)))
    wrong = 1 - np.array(correct, dtype=np.float64)[order]
    _risk_line(axes, wrong, "accepted first, then by P(correct)")
    axes.axhline(promise["bound"], color="black", linestyle="--", label=f"asked: at most {promise['bound']:.0%} wrong")
    if promise["accepted"]:
        label = f"accepted: {promise['accepted']} answers"
        axes.plot([promise["coverage"]], [promise["accepted_error"]], "o", label=label, clip_on=False)
    _risk_axes(axes, f"Errors of the cascade ({len(wrong)} questions)")
    figure.savefig(path)


def risk_coverage_picture(path: Path, scores: Mapping[str, tuple[Doubles, Doubles]]) -> None:
    """Error rate of the most confident answers against coverage, for each (confidence [n], correct [n])."""
    figure, (axes,) = new_figure(height=4.6)
    for name, (score, correct) in scores.items():
        wrong = 1 - correct[np.argsort(-score, kind="stable")]
        _risk_line(axes, wrong, f"{name}: AURC {aurc(score, correct):.3f}")
    n = max((len(score) for score, _ in scores.values()), default=0)
    _risk_axes(axes, f"Errors, most confident first ({n} questions)")
    figure.savefig(path)


def _risk_line(axes: Any, wrong: Doubles, label: str) -> None:
    """Share wrong among the first k rows against k / n."""
    shown = np.arange(1, len(wrong) + 1)
    axes.plot(shown / max(len(wrong), 1), np.cumsum(wrong) / shown, label=label)


def _risk_axes(axes: Any, title: str) -> None:
    axes.set(xlabel="share of questions answered", ylabel="share wrong", xlim=(0, 1), ylim=(0, None))
    axes.set_title(title)
    legend_below(axes)


def frontier_picture(path: Path, tried: Mapping[str, Sequence[tuple[float, float, float]]], n: int) -> None:
    """Accuracy on `n` questions against cost of each policy at each (threshold, accuracy, cost); 1 is the base alone.

    Each policy's best threshold is in the legend, and marked on its line.
    """
    figure, (axes,) = new_figure(height=5.0)
    unit = max((cost for _, _, cost in tried.get("base", ())), default=1.0) or 1.0
    for name, rows in tried.items():
        best = max(range(len(rows)), key=lambda i: rows[i][1] / rows[i][2] if rows[i][2] else 0.0)
        costs = [cost / unit for _, _, cost in rows]
        shares = [accuracy for _, accuracy, _ in rows]
        label = f"{name}: {rows[best][0]:.2f}"
        axes.plot(costs, shares, marker=".", label=label, markevery=[best], markersize=12)
    axes.set(xlabel="cost of a question (1: the base alone)", ylabel="share correct")
    axes.set_title(
        f"Accuracy and cost by threshold ({n} questions);\nthe point: best accuracy per cost", fontsize="medium"
    )
    legend_below(axes)
    figure.savefig(path)
