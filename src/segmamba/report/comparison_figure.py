"""Each case's score under each model, joined by lines, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segmamba.report.canvas import COLOURS, as_text, new_figure, save_figure
from segmamba.report.comparison_tables import metric_name
from segmamba.types import FloatArray, JsonDict

MOST_LABELS = 12
"""Rows of a picture that can still be looked at."""


def comparison_figure(
    comparison: JsonDict,
    values: dict[tuple[str, str], FloatArray],
    output: Path | str,
) -> None:
    """Draw a panel for each label and metric.

    Args:
        comparison: What `compare_scores` gave.
        values: (label, metric) to (cases, models); NaN where undefined.
        output: PNG file to write, atomically.
    """
    labels = comparison["labels"][:MOST_LABELS]
    metrics = [metric["name"] for metric in comparison["metrics"]]
    names = [model["name"] for model in comparison["models"]]
    width = 1.6 + 0.85 * min(len(names), 3) + 0.45 * max(len(names) - 3, 0)
    figure = new_figure(max(6.0, width * len(metrics)), 2.9 * len(labels) + 0.9)
    grid = figure.subplots(len(labels), len(metrics), squeeze=False)
    summary = {(r["label"], r["metric"], r["model"]): r for r in comparison["summary"]}
    for row, label in zip(grid, labels, strict=True):
        for axes, metric in zip(row, comparison["metrics"], strict=True):
            key = (label, metric["name"])
            _draw_cases(axes, values[key])
            _draw_means(axes, [summary[(*key, name)] for name in names])
            _dress(axes, names, label, metric)
            _scale(axes, values[key])
    figure.suptitle(_headline(comparison), fontsize=10)
    save_figure(figure, output)


def _draw_cases(axes: Any, values: FloatArray) -> None:
    """Draw a line a case and its points, which lie side by side where many agree."""
    cases, models = values.shape
    alpha = float(np.clip(12 / max(cases, 1), 0.12, 0.7))
    shift = np.linspace(-0.06, 0.06, cases) if cases > 1 else np.zeros(cases)
    places = np.arange(models)[:, None] + shift
    axes.plot(places, values.T, color="#9ca3af", linewidth=0.8, alpha=alpha)
    for index in range(models):
        axes.scatter(
            places[index],
            values[:, index],
            s=14,
            color=COLOURS[index % len(COLOURS)],
            alpha=0.75,
            linewidths=0,
            zorder=2,
        )


def _draw_means(axes: Any, rows: list[JsonDict]) -> None:
    for index, row in enumerate(rows):
        if row["mean"] is None:
            continue
        place = index + 0.22
        axes.plot([place, place], row["ci95"], color="black", linewidth=1.6, zorder=3)
        axes.plot(place, row["mean"], "D", color="black", markersize=4.5, zorder=3)


def _scale(axes: Any, values: FloatArray) -> None:
    """Bend the axis where a few far values would press all others together."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return
    typical = float(np.percentile(known, 75))
    if typical > 0 and known.min() >= 0 and known.max() > 20 * typical:
        axes.set_yscale("symlog", linthresh=2 * typical)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic from {2 * typical:.2g} up")


def _dress(axes: Any, names: list[str], label: str, metric: JsonDict) -> None:
    axes.set_xticks(range(len(names)), [as_text(_short(n)) for n in names])
    if max(map(len, names)) > 14 or len(names) > 4:
        for text in axes.get_xticklabels():
            text.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
    axes.set_xlim(-0.4, len(names) - 1 + 0.5)
    axes.set_ylabel(metric_name(metric["name"]))
    arrow = "higher is better" if metric["higher_is_better"] else "lower is better"
    axes.set_title(f"{as_text(label)} ({arrow})", fontsize=9)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _headline(comparison: JsonDict) -> str:
    text = f"{len(comparison['cases'])} cases, a line each; mean and its 95 % interval"
    hidden = len(comparison["labels"]) - MOST_LABELS
    return text + (f"; {hidden} more labels in the tables" if hidden > 0 else "")


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:11] + "…" + name[-11:]
