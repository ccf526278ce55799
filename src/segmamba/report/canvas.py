"""Figures without pyplot: made, coloured and saved in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segmamba.atomic import atomic_path

COLOURS = (
    "#2ca7c9",
    "#f2c14e",
    "#e4572e",
    "#7a5cc9",
    "#5fb65f",
    "#e58fb5",
    "#9c755f",
    "#4c78a8",
)
"""Colours of labels, told apart by people with any colour vision."""


def new_figure(width: float, height: float, *, dark: bool = False) -> Any:
    """Make a figure without pyplot, so no global state and no display is touched.

    Args:
        width: Inches.
        height: Inches.
        dark: A dark ground, for scans.

    Returns:
        A `matplotlib.figure.Figure` that draws with Agg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.set_facecolor("#0b0f14" if dark else "white")
    return figure


def save_figure(figure: Any, output: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
