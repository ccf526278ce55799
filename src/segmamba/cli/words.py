"""Words that several commands read or print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from segmamba.console import print_table
from segmamba.errors import ConfigError, describe

if TYPE_CHECKING:
    from segmamba.types import JsonDict


Output = Annotated[Path, arg(aliases=["-o"])]


def require_beside(option: str, other: str, *, is_given: bool, is_there: bool) -> None:
    """Refuse an option that nothing would heed.

    Args:
        option: As it is typed, such as "--seg-type".
        other: What it belongs to.
        is_given: Whether the option is given.
        is_there: Whether the other is.

    Raises:
        ConfigError: The option stands alone.
    """
    if is_given and not is_there:
        raise ConfigError(
            describe(
                f"{option} does nothing here",
                expected=f"{other} beside it",
                remedy=f"Add {other}, or leave out {option}.",
            )
        )


def parse_duration(text: str | None) -> float | None:
    """Read a time such as 90s, 10m or 1h30m; a number alone means seconds.

    Args:
        text: The time, or None.

    Returns:
        Seconds, or None.

    Raises:
        ConfigError: It isn't such a time, or is zero.
    """
    if text is None:
        return None
    parts = "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "hms")
    match = re.fullmatch(rf"{parts}|(\d+(?:\.\d+)?)", text.strip())
    found = map(float, match.groups(default="0")) if match else (0.0,)
    total = sum(n * size for n, size in zip(found, (3600, 60, 1, 1), strict=False))
    if total <= 0:
        raise ConfigError(
            describe("bad time", expected="such as 90s, 10m or 1h30m", found=text)
        )
    return total


def print_summary(metrics: JsonDict) -> None:
    """Print mean and 95 % interval of Dice and HD95 for each label."""
    shown = {"dice": "Dice", "hd95_mm": "HD95 mm"}
    summary = metrics["summary"]
    if all("lesion_dice" in row for row in summary.values()):
        shown |= {"lesion_dice": "lesion Dice", "lesion_hd95_mm": "lesion HD95 mm"}
    rows = []
    for label, row in summary.items():
        cells = [_mean_and_interval(row[name]) for name in shown]
        rows.append((label, *cells, str(row["dice"]["n"])))
    header = (f"{name} (95 % interval)" for name in shown.values())
    print_table("Scores on whole volumes", ("label", *header, "cases"), rows)


def print_calibration(calibration: JsonDict) -> None:
    """Print calibration errors, and rank correlations of scores with Dice."""
    names = {"labelled": "ECE, labelled voxels", "all": "ECE, all voxels"}
    found = calibration["reliability"].items()
    rows = [(names[area], _plain(row["ece"])) for area, row in found]
    scores = calibration["scores"]
    rows += [
        ("Spearman of expected Dice and Dice", _rank(scores["expected_dice"])),
        ("Spearman of entropy (sign turned) and Dice", _rank(scores["mean_entropy"])),
        ("mean error of expected Dice", _plain(scores["dice_error"])),
    ]
    for label, row in scores["structures"].items():
        rank = _rank(row["expected_dice"])
        rows.append((f"Spearman of expected Dice and Dice, {label}", rank))
    print_table("How well uncertainty tells of errors", ("what", "value"), rows)


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rank(row: JsonDict) -> str:
    if row["spearman"] is None:
        return "-"
    low, high = row["ci95"]
    return f"{row['spearman']:.3f} ({low:.3f} to {high:.3f}), {row['n']} cases"


def _mean_and_interval(row: JsonDict) -> str:
    if row["mean"] is None:
        return "-"
    low, high = row["ci95"]
    return f"{row['mean']:.3f} ({low:.3f} to {high:.3f})"
