"""Figures without pyplot: made, coloured and saved in one place."""

from __future__ import annotations

from collections.abc import Sequence
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


def as_text(name: str) -> str:
    """Write a name so that a figure shows it as it is: dollars would enclose maths."""
    return name.replace("$", r"\$")


def shortened(texts: Sequence[str], most: int) -> list[str]:
    """Leave out what a figure has no room for, and say how much that is.

    Args:
        texts: Labels or scores, the most important first.
        most: How many there is room for.

    Returns:
        The texts, or the first ones and a last one such as "and 105 more".
    """
    if len(texts) <= most:
        return list(texts)
    return [*texts[: most - 1], f"and {len(texts) - most + 1} more"]


def legend_columns(names: Sequence[str], inches: float) -> int:
    """Choose how many columns of a legend fit beside each other.

    Args:
        names: Its texts, at least one.
        inches: Width of the figure, of about twelve letters an inch.
    """
    width = max(map(len, names)) + 6  # with the patch in front
    return max(1, min(5, len(names), int(12 * inches) // width))


def save_figure(figure: Any, output: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
