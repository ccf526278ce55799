"""The course of a training as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmamba.errors import FormatError, describe
from segmamba.report.canvas import (
    COLOURS,
    as_text,
    legend_columns,
    new_figure,
    save_figure,
)
from segmamba.types import FloatArray, JsonDict

MOST_SCORES = 12
"""Lines of validation scores that can be told apart."""


def training_curve(log: Path | str, output: Path | str) -> None:
    """Draw loss, learning rate and validation scores against the epochs.

    Args:
        log: The run's `log.jsonl`: one JSON object an epoch with "epoch", "loss",
            "learning_rate", "elapsed_s" and, now and then, "validation".
        output: PNG file to write, atomically.

    Raises:
        FormatError: The log can't be read or has no epoch.
    """
    lines = read_epochs(log)
    figure = new_figure(8.0, 5.2)
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    epochs = [line["epoch"] for line in lines]
    _draw_loss(upper, epochs, lines)
    _draw_validation(upper, lines)
    rates = [_number(line.get("learning_rate")) for line in lines]
    lower.plot(epochs, rates, color="#6b7280", linewidth=1.4)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _label_epochs(lower, lines)
    for axes in (upper, lower):
        _plain(axes)
    save_figure(figure, output)


def read_epochs(log: Path | str) -> list[JsonDict]:
    """Read the lines of a `log.jsonl`; a last line that was cut off is left out.

    Args:
        log: The file.

    Returns:
        One dictionary an epoch, at least one.

    Raises:
        FormatError: The file can't be read or has no epoch.
    """
    try:
        text = Path(log).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FormatError(
            describe("can't read a training log", found=error.strerror, file=log)
        ) from error
    lines = [line for line in map(_json_or_none, text.splitlines()) if line]
    if not lines:
        raise FormatError(
            describe(
                "a training log is empty",
                expected="one JSON object an epoch",
                found="none",
                file=log,
            )
        )
    return lines


def _json_or_none(text: str) -> JsonDict | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "epoch" in line else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _label_epochs(axes: Any, lines: Sequence[JsonDict]) -> None:
    """Write the time that had passed under each epoch of the axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    times = np.array([_number(line.get("elapsed_s")) for line in lines])
    epochs = np.array([float(line["epoch"]) for line in lines])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not np.isfinite(times).all():
        axes.set_xlabel("epoch")
        return
    unit, seconds = ("h", 3600) if times[-1] >= 7200 else ("min", 60)

    def label(epoch: float, _: int) -> str:
        if not 0 <= epoch <= epochs[-1]:
            return ""
        passed = np.interp(epoch, [0.0, *epochs], [0.0, *times])
        return f"{epoch:g}\n{passed / seconds:.1f} {unit}"

    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.set_xlabel("epoch and time")


def _draw_loss(axes: Any, epochs: Sequence[float], lines: Sequence[JsonDict]) -> None:
    loss = np.array([_number(line.get("loss")) for line in lines])
    axes.plot(epochs, loss, color="#4c78a8", alpha=0.35, linewidth=1)
    axes.plot(epochs, _smooth(loss), color="#4c78a8", linewidth=1.8, label="loss")
    axes.set_ylabel("training loss")


def _smooth(values: FloatArray) -> FloatArray:
    """Exponential mean over about a twentieth of the run, NaN left out."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth, mean, weight = np.full(len(values), np.nan), 0.0, 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        if weight > 0:
            smooth[index] = mean / weight
    return smooth


def _draw_validation(axes: Any, lines: Sequence[JsonDict]) -> None:
    """Draw each validation score on an axis of its own to the right."""
    rows = [line for line in lines if isinstance(line.get("validation"), dict)]
    handles, names = axes.get_legend_handles_labels()
    if rows:
        right = axes.twinx()
        scores = list(rows[-1]["validation"])
        shown = scores
        if len(scores) > MOST_SCORES:  # the mean comes last
            shown = [*scores[: MOST_SCORES - 1], scores[-1]]
        for index, name in enumerate(shown):
            values = [_number(row["validation"].get(name)) for row in rows]
            right.plot(
                [row["epoch"] for row in rows],
                values,
                color=COLOURS[(index + 2) % len(COLOURS)],
                marker="o",
                markersize=3.5,
                linewidth=1.4,
                label=f"validation {as_text(name)}",
            )
        right.set_ylim(0, 1)
        hidden = len(scores) - len(shown)
        right.set_ylabel(
            "validation Dice" + (f" ({hidden} more in log.jsonl)" if hidden else "")
        )
        right.spines["top"].set_visible(False)
        more = right.get_legend_handles_labels()
        handles, names = handles + more[0], names + more[1]
    axes.legend(
        handles,
        names,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=legend_columns(names, axes.figure.get_figwidth()),
        frameon=False,
        fontsize=9,
    )


def _plain(axes: Any) -> None:
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
