"""Speed against size, drawn from the JSON of a benchmark."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from segmamba.errors import ConfigError, describe
from segmamba.report.canvas import COLOURS, new_figure, save_figure
from segmamba.types import JsonDict

Line = list[tuple[float, float]]
"""Points (x, y)."""


def benchmark_figure(data: JsonDict, output: Path | str) -> None:
    """Draw what `segmamba benchmark size` or `scan` measured.

    Args:
        data: The record's JSON.
        output: PNG file to write, atomically.

    Raises:
        ConfigError: The JSON holds no measurement of sizes.
    """
    rows = [row for row in data.get("measurements", ()) if "median_ms" in row]
    if any("ns_per_voxel" in row for row in rows):
        figure = _draw_sizes(rows)
    elif any(len(row.get("shape", ())) == 3 for row in rows):
        figure = _draw_scans(rows)
    else:
        raise ConfigError(
            describe(
                "nothing to draw",
                expected="measurements of 'segmamba benchmark size' or 'scan'",
                found=data.get("what"),
            )
        )
    figure.suptitle(f"{data['device']}, {data['dtype']}", fontsize=10)
    save_figure(figure, output)


def _draw_sizes(rows: list[JsonDict]) -> Any:
    figure = new_figure(8.0, 3.6)
    voxels, left = figure.subplots(1, 2)
    sides = [row["shape"][-1] for row in rows]
    voxels.plot(sides, [row["ns_per_voxel"] for row in rows], "o-", color=COLOURS[0])
    voxels.set_ylabel("inference, ns per voxel")
    left.plot(sides, [row["median_ms"] for row in rows], "o-", color=COLOURS[0])
    left.set_ylabel("inference, ms")
    for axes in (voxels, left):
        axes.set_xlabel("side of the cube, voxels")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return figure


def _draw_scans(rows: list[JsonDict]) -> Any:
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    rows_of_panels = -(-len(modes) // 2)
    figure = new_figure(9.2, 4.2 * rows_of_panels)
    panels = figure.subplots(rows_of_panels, 2, sharex=True, sharey=True).flat
    for axes, mode in zip(panels, modes, strict=True):
        for (subject, width), points in scan_lines(rows, mode).items():
            axes.plot(
                *zip(*points, strict=True),
                "o-" if subject == "segmamba" else "x--",
                color=_colour(rows, width),
                label=f"{subject}, B x D = {width}",
                markersize=4,
            )
        axes.set(title=mode, ylabel="ms", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.set_xlabel("length L")
    panels[0].legend(fontsize=7)
    return figure


def scan_lines(rows: list[JsonDict], mode: str) -> dict[tuple[str, int], Line]:
    """Sort the rows of a scan benchmark into lines.

    Args:
        rows: Rows with figures.
        mode: Which to take.

    Returns:
        (length, ms) in ascending order, by subject and batch times channels.
    """
    lines: dict[tuple[str, int], Line] = defaultdict(list)
    for row in rows:
        if row["mode"] == mode:
            batch, channels, length = row["shape"]
            point = (float(length), float(row["median_ms"]))
            lines[row["subject"], batch * channels].append(point)
    return {key: sorted(points) for key, points in lines.items()}


def _colour(rows: list[JsonDict], width: int) -> str:
    widths = sorted({row["shape"][0] * row["shape"][1] for row in rows})
    return COLOURS[widths.index(width) % len(COLOURS)]
