"""Pictures of segmentations beside their references."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmamba.data.labels import LabelScheme
from segmamba.errors import GeometryError, describe
from segmamba.io import Volume
from segmamba.report.canvas import (
    COLOURS,
    as_text,
    legend_columns,
    new_figure,
    save_figure,
    shortened,
)
from segmamba.report.curve import training_curve
from segmamba.report.views import PLANES, Plane, Turned, section_indices, turn
from segmamba.types import Array, FloatArray, JsonDict, Size3

__all__ = [
    "Picture",
    "case_figure",
    "draw_cases",
    "training_curve",
    "worst_case_ids",
    "worst_cases_figure",
]

MOST_NAMES = 20
"""Labels that a legend has room for."""

Groups = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Picture:
    """One case to draw."""

    title: str
    image: Array
    """(I, J, K) intensities."""
    reference: Array
    """(I, J, K) integers."""
    prediction: Array
    """(I, J, K) integers."""
    affine: FloatArray
    """(4, 4): voxel index to RAS+ mm."""
    scores: Mapping[str, float] | None = None
    """Label to Dice, for the line below the title."""


def case_figure(
    image: Volume | Array,
    reference: Array,
    prediction: Array,
    output: Path | str,
    *,
    affine: FloatArray | None = None,
    labels: LabelScheme | Groups | None = None,
    channel: int = 0,
    title: str = "",
    scores: Mapping[str, float] | None = None,
) -> None:
    """Draw three planes of a case: image, reference and prediction side by side.

    Args:
        image: Volume of any channels, or (I, J, K) or (C, I, J, K) intensities.
        reference: (I, J, K) integers; the planes go through its largest sections.
        prediction: (I, J, K) integers.
        output: PNG file to write, atomically.
        affine: (4, 4), needed if `image` is an array: voxel index to RAS+ mm.
        labels: Names of the integers; None names each by its number.
        channel: Which channel to show.
        title: Such as the case's id.
        scores: Label to Dice.

    Raises:
        GeometryError: The shapes differ.
    """
    if isinstance(image, Volume):
        voxels, matrix = image.array[channel], image.affine
    else:
        voxels = image[channel] if image.ndim == 4 else image
        matrix = np.eye(4) if affine is None else affine
    picture = Picture(title, voxels, reference, prediction, matrix, scores)
    draw_cases([picture], output, labels=labels)


def worst_cases_figure(
    pictures: Sequence[Picture],
    output: Path | str,
    *,
    labels: LabelScheme | Groups | None = None,
) -> None:
    """Draw the worst cases of an evaluation, a row each, in their main plane.

    Args:
        pictures: The cases, worst first.
        output: PNG file to write, atomically.
        labels: Names of the integers; None names each by its number.

    Raises:
        GeometryError: The shapes of a case differ.
    """
    draw_cases(pictures, output, labels=labels, planes=PLANES[:1])


def draw_cases(
    pictures: Sequence[Picture],
    output: Path | str,
    *,
    labels: LabelScheme | Groups | None = None,
    planes: Sequence[Plane] = PLANES,
) -> None:
    """Draw cases, a row for each plane of each case.

    Args:
        pictures: The cases, at least one.
        output: PNG file to write, atomically.
        labels: Names of the integers; None names each by its number.
        planes: Which planes.

    Raises:
        GeometryError: The shapes of a case differ.
    """
    scenes = [_scene(picture) for picture in pictures]
    parts = _parts(labels, pictures)
    heights = [s.image.shape_on_page(plane) for s in scenes for plane in planes]
    column = 2.9 if len(pictures) == 1 else 2.5  # captions take a little width
    inches = [column * min(height, 1.6) for height in heights]
    figure = new_figure(9.2, sum(inches) + 1.1, dark=True)
    grid = figure.subplots(
        len(inches), 3, squeeze=False, gridspec_kw={"height_ratios": inches}
    )
    for number, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        first = number * len(planes)
        _draw_scene(grid[first : first + len(planes)], scene, planes, parts)
        if len(pictures) > 1:
            _caption(grid[first, 0], picture)
    for axes, name in zip(grid[0], ("image", "reference", "prediction"), strict=True):
        axes.set_title(name, color="white", fontsize=11)
    if len(pictures) == 1:
        _headline(figure, pictures[0])
    _legend(figure, parts)
    save_figure(figure, output)


def worst_case_ids(metrics: JsonDict, count: int = 4) -> list[str]:
    """Name the cases with the lowest mean Dice over their labels.

    Args:
        metrics: What `evaluate_folder` gave.
        count: How many at most.

    Returns:
        Case ids, worst first.
    """
    means = {
        case: float(np.mean([row["dice"] for row in rows.values()]))
        for case, rows in metrics["cases"].items()
        if rows
    }
    return sorted(means, key=lambda case: (means[case], case))[:count]


def _parts(
    labels: LabelScheme | Groups | None, pictures: Sequence[Picture]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to colour and integers of the exclusive parts that are painted."""
    if isinstance(labels, LabelScheme):
        singles = {n: (v,) for n, v in labels.labels.items() if v != 0}
        groups: Groups = singles or labels.evaluated
    elif labels is not None:
        groups = labels
    else:
        values: set[int] = set()
        for picture in pictures:
            for array in (picture.reference, picture.prediction):
                values.update(int(value) for value in np.unique(array))
        groups = {f"label {value}": (value,) for value in sorted(values - {0})}
    # Larger unions first, so that what they contain is painted over them.
    ordered = sorted(groups, key=lambda name: -len(groups[name]))
    return {
        name: (COLOURS[index % len(COLOURS)], tuple(groups[name]))
        for index, name in enumerate(ordered)
    }


def _check_shapes(picture: Picture) -> None:
    shapes = [np.shape(a) for a in (picture.reference, picture.prediction)]
    if any(shape != np.shape(picture.image) for shape in shapes):
        raise GeometryError(
            describe(
                f"can't draw {picture.title or 'a case'}: shapes differ",
                expected=f"{np.shape(picture.image)} as the image",
                found=f"reference {shapes[0]}, prediction {shapes[1]}",
            )
        )


@dataclass(frozen=True)
class _Scene:
    """A case turned for the page and cut to its content."""

    image: Turned
    reference: Turned
    prediction: Turned
    indices: Size3
    window: tuple[float, float]


def _scene(picture: Picture) -> _Scene:
    _check_shapes(picture)
    image, reference, prediction = (
        turn(array, picture.affine)
        for array in (picture.image, picture.reference, picture.prediction)
    )
    crop = _content(image.array)
    image, reference, prediction = (
        Turned(item.array[crop], item.spacing_mm)
        for item in (image, reference, prediction)
    )
    shown = reference.array if np.any(reference.array) else prediction.array
    window = _window(image.array)
    return _Scene(image, reference, prediction, section_indices(shown), window)


def _draw_scene(
    grid: Any, scene: _Scene, planes: Sequence[Plane], parts: Mapping[str, Any]
) -> None:
    for row, plane in zip(grid, planes, strict=True):
        layers = (None, scene.reference, scene.prediction)
        for axes, layer in zip(row, layers, strict=True):
            _draw_plane(axes, scene, layer, plane, parts)


def _window(image: Array) -> tuple[float, float]:
    """Grey values from black to white: percentiles of what isn't background."""
    values = image[np.isfinite(image) & (image != image.flat[0])]
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values[:: max(1, values.size // 200_000)], [0.5, 99.7])
    low = min(float(low), 0.0) if float(image.flat[0]) == 0 else float(low)
    return low, max(float(high), low + 1e-6)


def _content(image: Array) -> tuple[slice, ...]:
    """Box around what isn't background, with a margin."""
    mask = image != image.flat[0]
    box = []
    for axis, size in enumerate(image.shape):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if places.size == 0:
            return (slice(0, None),) * 3
        margin = max(1, size // 40)
        start = max(0, int(places[0]) - margin)
        box.append(slice(start, int(places[-1]) + 1 + margin))
    return tuple(box)


def _draw_plane(
    axes: Any,
    scene: _Scene,
    layer: Turned | None,
    plane: Plane,
    parts: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    index = scene.indices[plane.axis]
    section, aspect = scene.image.cut(plane, index), scene.image.aspect(plane)
    low, high = scene.window
    axes.imshow(
        section,
        cmap="gray",
        vmin=low,
        vmax=high,
        aspect=aspect,
        interpolation="bilinear",
    )
    if layer is not None:
        paint = _paint(layer.cut(plane, index), parts)
        axes.imshow(paint, aspect=aspect, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    _letters(axes, plane)


def _paint(
    section: Array, parts: Mapping[str, tuple[str, tuple[int, ...]]]
) -> FloatArray:
    """Colours with opacity, (rows, columns, 4): rims stronger than the inside."""
    from matplotlib.colors import to_rgb

    paint = np.zeros((*section.shape, 4), np.float32)
    for colour, values in parts.values():
        mask = np.isin(section, values)
        paint[mask, :3], paint[mask, 3] = to_rgb(colour), 0.55
        paint[mask & ~_inside(mask), 3] = 1.0
    return paint


def _inside(mask: Array) -> Array:
    padded = np.pad(mask, 1)
    across = padded[:-2, 1:-1] & padded[2:, 1:-1]
    return mask & across & padded[1:-1, :-2] & padded[1:-1, 2:]


def _letters(axes: Any, plane: Plane) -> None:
    """Write the directions at the edges, legible on black and on white."""
    from matplotlib.patheffects import withStroke

    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"))
    alignments = (*sides, ("center", "bottom"))
    outline = [withStroke(linewidth=2, foreground="black")]
    for letter, place, (horizontal, vertical) in zip(
        plane.edges, places, alignments, strict=True
    ):
        axes.text(
            *place,
            letter,
            transform=axes.transAxes,
            color="white",
            fontsize=9,
            ha=horizontal,
            va=vertical,
            path_effects=outline,
        )


def _caption(axes: Any, picture: Picture) -> None:
    lines = [as_text(picture.title), *_score_texts(picture)]
    axes.set_ylabel(
        "\n".join(lines),
        color="white",
        fontsize=9,
        rotation=0,
        ha="right",
        va="center",
        labelpad=8,
    )


def _headline(figure: Any, picture: Picture) -> None:
    scores = ", ".join(_score_texts(picture))
    text = as_text(picture.title) + (f"   Dice: {scores}" if scores else "")
    if text:
        figure.suptitle(textwrap.fill(text, 90), color="white", fontsize=12)


def _score_texts(picture: Picture) -> list[str]:
    scores = (picture.scores or {}).items()
    return shortened([f"{as_text(name)} {value:.3f}" for name, value in scores], 6)


def _legend(figure: Any, parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    from matplotlib.patches import Patch

    names = shortened(list(map(as_text, parts)), MOST_NAMES)
    colours = [colour for colour, _ in parts.values()]
    handles = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=False)]
    if len(parts) > MOST_NAMES:
        handles[-1].set_alpha(0)  # the last one stands for many
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=legend_columns(names, figure.get_figwidth()),
            frameon=False,
            labelcolor="white",
            fontsize=10,
        )
