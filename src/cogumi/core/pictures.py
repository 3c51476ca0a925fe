"""Matplotlib figures without a display and without global state."""

from __future__ import annotations

from typing import Any


def new_figure(panels: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes side by side, each of `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def legend_below(axes: Any, columns: int = 2) -> None:
    """The legend of `axes` below them, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize="small")
