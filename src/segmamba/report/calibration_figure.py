"""Confidence against what was right, and expected against found Dice, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segmamba.report.canvas import COLOURS, new_figure, save_figure
from segmamba.types import JsonDict


def calibration_figure(calibration: JsonDict, output: Path | str) -> None:
    """Draw a reliability diagram and each case's Dice over what was expected.

    Args:
        calibration: What `workflow.calibration.calibrate` gave.
        output: PNG file to write, atomically.
    """
    figure = new_figure(9.0, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_reliability(left, calibration["reliability"])
    _draw_cases(right, calibration["scores"])
    save_figure(figure, output)


def _draw_reliability(axes: Any, reliability: JsonDict) -> None:
    axes.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1)
    for colour, (area, found) in zip(COLOURS, reliability.items(), strict=False):
        bins = found["bins"]
        sure = [row["confidence"] for row in bins]
        right = [row["accuracy"] for row in bins]
        ece = "-" if found["ece"] is None else f"{found['ece']:.3f}"
        name = {"labelled": "labelled voxels", "all": "all voxels"}[area]
        axes.plot(sure, right, "o-", color=colour, label=f"{name}: ECE {ece}")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="confidence", ylabel="share that is right", title="Reliability")
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_cases(axes: Any, scores: JsonDict) -> None:
    rows = [r for r in scores["cases"].values() if r["expected_dice"] is not None]
    expected = np.array([row["expected_dice"] for row in rows])
    found = np.array([row["dice"] for row in rows])
    axes.scatter(expected, found, s=22, color=COLOURS[0], linewidths=0, alpha=0.8)
    if len(rows):
        low = min(expected.min(), found.min()) - 0.02
        axes.plot([low, 1], [low, 1], color="#9ca3af", linewidth=1)
        axes.set(xlim=(low, 1), ylim=(low, 1))
    rho = scores["expected_dice"]["spearman"]
    title = f"Cases: Spearman {'-' if rho is None else f'{rho:.2f}'}"
    axes.set(xlabel="expected Dice", ylabel="Dice", title=title, aspect="equal")
