"""Pictures of training: what was validated, against the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def curves_picture(
    path: Path, validations: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str], label: str
) -> None:
    """One line for each named figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in names:
        axes.plot([step for step, _ in validations], [found[name] for _, found in validations], "o-", label=name)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
