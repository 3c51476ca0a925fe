"""Plots of a build: accuracy by tier, reliability of gates, risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.metrics import BINS, aurc, ece, reliability
from cogumi.core.pictures import new_figure

Doubles = NDArray[np.float64]


def reliability_picture(path: Path, gates: Mapping[str, tuple[Doubles, Doubles]]) -> None:
    """Share correct against P(correct) for each gate's (probabilities [n], correct [n])."""
    figure, axes = new_figure(1)
    axes[0].plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, (p, correct) in gates.items():
        rows = [(mean, share) for n, mean, share in reliability(p, correct) if n]
        label = f"{name}: n {len(p)}, ECE {ece(p, correct):.3f}"
        axes[0].plot([m for m, _ in rows], [s for _, s in rows], marker="o", label=label)
    axes[0].set(xlabel=f"P(correct), {BINS} bins", ylabel="share correct", xlim=(0, 1), ylim=(0, 1))
    axes[0].legend(loc="upper left")
    figure.savefig(path)


def histogram_picture(path: Path, panels: Sequence[tuple[str, Mapping[str, Doubles], float | None]]) -> None:
    """One panel per (label of the x axis, values of each group, threshold)."""
    figure, axes = new_figure(len(panels))
    for axis, (label, groups, threshold) in zip(axes, panels, strict=True):
        values = np.concatenate(list(groups.values()))
        bins = np.linspace(values.min(), max(values.max(), values.min() + 1e-9), 31) if len(values) else 30
        for name, group in groups.items():
            axis.hist(group, bins=bins, alpha=0.6, label=f"{name} ({len(group)})")
        if threshold is not None:
            axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.2f}")
        axis.set(xlabel=label, ylabel="questions")
        axis.legend(loc="upper right")
    figure.savefig(path)


def accuracy_picture(path: Path, accuracy: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]) -> None:
    """Share correct by difficulty, one group of bars per level, one bar per tier."""
    figure, axes = new_figure(1)
    levels = sorted({level for cells in accuracy.values() for row in cells.values() for level in row})
    width = 0.8 / len(accuracy)
    for i, (tier, cells) in enumerate(accuracy.items()):
        pairs = [[row[level] for row in cells.values() if level in row] for level in levels]
        shares = [sum(c for c, _ in found) / max(sum(n for _, n in found), 1) for found in pairs]
        axes[0].bar(np.arange(len(levels)) + (i - len(accuracy) / 2 + 0.5) * width, shares, width, label=tier)
    axes[0].set_xticks(range(len(levels)), [f"level {k}" if k != "0" else "no answer" for k in levels])
    axes[0].set(ylabel="share correct", ylim=(0, 1))
    axes[0].legend(loc="upper left")
    figure.savefig(path)


def risk_picture(path: Path, p: Sequence[float], correct: Sequence[bool], promise: Mapping[str, Any]) -> None:
    """Error rate of the most confident answers against coverage, with the guaranteed bound and the operating point."""
    figure, axes = new_figure(1)
    wrong = 1 - np.array(correct, dtype=np.float64)[np.argsort(-np.array(p), kind="stable")]
    shown = np.arange(1, len(wrong) + 1)
    axes[0].plot(shown / len(wrong), np.cumsum(wrong) / shown, label="cascade, most confident first")
    axes[0].axhline(promise["bound"], color="black", linestyle="--", label=f"promise {promise['bound']:.0%}")
    axes[0].plot([promise["coverage"]], [promise["accepted_error"]], "o", label="accepted answers")
    axes[0].set(xlabel="share of questions answered", ylabel="share wrong", xlim=(0, 1), ylim=(0, None))
    axes[0].legend(loc="upper left")
    figure.savefig(path)


def risk_coverage_picture(path: Path, scores: Mapping[str, tuple[Doubles, Doubles]]) -> None:
    """Error rate of the most confident answers against coverage, for each (confidence [n], correct [n])."""
    figure, axes = new_figure(1)
    for name, (score, correct) in scores.items():
        wrong = 1 - correct[np.argsort(-score, kind="stable")]
        shown = np.arange(1, len(wrong) + 1)
        axes[0].plot(shown / len(wrong), np.cumsum(wrong) / shown, label=f"{name}: AURC {aurc(score, correct):.3f}")
    axes[0].set(xlabel="share of questions answered", ylabel="share wrong", xlim=(0, 1), ylim=(0, None))
    axes[0].legend(loc="upper left")
    figure.savefig(path)


def frontier_picture(path: Path, tried: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """Accuracy against cost of each policy at each (threshold, accuracy, cost)."""
    figure, axes = new_figure(1)
    for name, rows in tried.items():
        line = axes[0].plot([cost for _, _, cost in rows], [a for _, a, _ in rows], marker=".", label=name)[0]
        threshold, accuracy, cost = max(rows, key=lambda row: row[1] / row[2] if row[2] else 0.0)
        axes[0].annotate(f"{threshold:.2f}", (cost, accuracy), color=line.get_color())
    axes[0].set(xlabel="cost of a question (tokens x bytes of their model)", ylabel="share correct")
    axes[0].legend(loc="lower right")
    figure.savefig(path)
