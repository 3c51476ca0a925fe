"""Plots of training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cogumi.core.pictures import new_figure


def curves_picture(
    path: Path, curve: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str], label: str
) -> None:
    """One line for each named figure, at the steps that have it; logarithmic if values span a factor above 100."""
    figure, (axes,) = new_figure(width=6)
    shown: list[float] = []
    for name in names:
        steps = [step for step, found in curve if name in found]
        values = [found[name] for _, found in curve if name in found]
        axes.plot(steps, values, "-", label=name)
        shown += values
    if shown and min(shown) > 0 and max(shown) > 100 * min(shown):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
