"""Put slices in order, and find all that keeps them from being one grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from segmamba.errors import GeometryError, describe
from segmamba.io.dicom_headers import Slice
from segmamba.io.geometry import GRID_TOLERANCE_VOXELS, checked_affine
from segmamba.types import Array, FloatArray

SAME_DIRECTION = 1e-3
"""Direction cosines that differ by less count as the same."""
SAME_PLACE_MM = 1e-2
"""Slices nearer than this lie at one place."""
MISSING = 1.5
"""A step this many times the usual one leaves out a slice."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def arrange(
    slices: Sequence[Slice], thickness: float | None, name: str
) -> tuple[tuple[Slice, ...], FloatArray]:
    """Sort slices along their normal and give the affine of the grid that they form.

    Args:
        slices: Of one series, in any order.
        thickness: Distance between slices that the header states in mm, for a series
            of one slice.
        name: The series, for errors.

    Returns:
        The slices in order, the position growing along the normal (the cross product
        of row and column directions), and the affine (4, 4): (column, row, slice) to
        RAS+ mm.

    Raises:
        GeometryError: Positions are not stated; a spacing is zero or negative; slices
            differ in size, spacing or orientation; two lie at one place; some are
            missing; steps are uneven; or the gantry was tilted. The text names the
            files.
    """
    _check_stated(slices, name)
    for what, values in (
        ("size (rows, columns)", [item.size for item in slices]),
        ("pixel spacing", [_rounded(item.pixel_spacing, 5) for item in slices]),
        ("orientation", [_rounded(item.orientation, 2) for item in slices]),
    ):
        _check_alike(what, values, slices, name)
    axes = _directions(slices, name)
    positions = np.array([item.position for item in slices], np.float64)
    order = np.argsort(positions @ axes[2], kind="stable")
    ordered, positions = tuple(slices[i] for i in order), positions[order]
    step = _step(positions @ axes[2], ordered, thickness, name)
    rows_mm, columns_mm = _pixel_spacing(slices, name)
    _check_straight(positions, axes, min(rows_mm, columns_mm), ordered, name)
    affine = np.eye(4)
    affine[:3, :3] = (axes * [[columns_mm], [rows_mm], [step]]).T
    affine[:3, 3] = positions[0]
    return ordered, checked_affine(_LPS_TO_RAS @ affine, slices[0].file.path)


def missing_at_ends(slices: Sequence[Slice], acquired: int | None) -> str | None:
    """Look for signs that slices before the first or behind the last one are missing.

    No gap tells of them. Only numbers do, and these are no proof: a series may be a
    part of an acquisition.

    Args:
        slices: In order, each in a file of its own.
        acquired: How many the header says were taken.

    Returns:
        The sign; None if there is none.
    """
    numbers = sorted(item.number for item in slices if item.number is not None)
    if len({item.file for item in slices}) < len(slices):
        return None
    if acquired is not None and acquired > len(slices):
        return f"{len(slices)} of {acquired} that were acquired"
    first = numbers[0] if numbers else 1
    if first > 1 and numbers == list(range(first, first + len(slices))):
        return f"instance numbers {first} to {numbers[-1]}, not from 1"
    return None


def _check_stated(slices: Sequence[Slice], name: str) -> None:
    for tag, attribute in (
        ("ImagePositionPatient", "position"),
        ("ImageOrientationPatient", "orientation"),
        ("PixelSpacing", "pixel_spacing"),
    ):
        lacking = [item for item in slices if getattr(item, attribute) is None]
        if lacking:
            raise _error(
                f"{name} doesn't say where its slices lie",
                f"the tag {tag} in each",
                f"{len(lacking)} of {len(slices)} without it",
                lacking[0],
                "Choose another series with --series: this may be a report or capture.",
            )


def _pixel_spacing(slices: Sequence[Slice], name: str) -> tuple[float, ...]:
    spacing = slices[0].pixel_spacing or ()
    if min(spacing) <= 0:
        raise _error(
            f"{name} has an unusable pixel spacing",
            "sizes in mm above 0",
            " and ".join(f"{size:g}" for size in spacing),
            slices[0],
            "Export the series again.",
        )
    return spacing


def _rounded(values: Sequence[float] | None, digits: int) -> tuple[float, ...]:
    return tuple(round(value, digits) + 0.0 for value in values or ())


def _check_alike(
    what: str, values: Sequence[Any], slices: Sequence[Slice], name: str
) -> None:
    """Compare with the first: rounding may part what is nearly the same."""
    first = np.asarray(values[0], np.float64)
    tolerance = 0.02 if what == "orientation" else 2e-5
    different = [np.abs(np.asarray(v) - first).max() > tolerance for v in values]
    if any(different):
        counts = Counter(values).most_common(4)
        raise _error(
            f"{name} mixes slices of different {what}",
            "one for all",
            "; ".join(f"{value} in {count} files" for value, count in counts),
            slices[different.index(True)],
            "It may be a localizer, or several scans in one series: part them first.",
        )


def _directions(slices: Sequence[Slice], name: str) -> FloatArray:
    """Directions of growing column, row and slice index (LPS+), (3, 3), as rows."""
    cosines = np.array([item.orientation for item in slices], np.float64)
    off = np.abs(cosines - cosines[0]).max(axis=1)
    if off.max() > SAME_DIRECTION:
        raise _error(
            f"{name} mixes slices of different orientation",
            "one for all",
            f"direction cosines that differ by {off.max():.3g}",
            slices[int(off.argmax())],
            "Part the series by orientation first.",
        )
    row, column = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(row @ column) > SAME_DIRECTION:
        raise _error(
            f"{name} has a bad orientation",
            "two directions of length 1 at a right angle",
            " ".join(f"{value:.5g}" for value in cosines[0]),
            slices[0],
            "Export the series again.",
        )
    return np.stack([row, column, np.cross(row, column)])


def _step(
    places: Array, slices: Sequence[Slice], thickness: float | None, name: str
) -> float:
    """Distance between neighbouring slices, in mm, if it is the same for all."""
    if len(places) == 1:
        return _single_step(slices[0], thickness, name)
    steps = np.diff(places)
    _check_twice(steps, slices, name)
    usual = float(np.median(steps))
    _check_missing(steps, usual, slices, name)
    even = np.linspace(places[0], places[-1], len(places))
    step = float(even[1] - even[0])
    off = np.abs(places - even)
    if off.max() > GRID_TOLERANCE_VOXELS * step:
        raise _error(
            f"{name} has uneven steps between slices",
            f"{step:.4g} mm",
            f"{steps.min():.4g} to {steps.max():.4g} mm",
            slices[int(off.argmax())],
            "Resample it to even steps first, for example with dcm2niix.",
        )
    return step


def _single_step(item: Slice, thickness: float | None, name: str) -> float:
    if thickness is not None:
        return thickness
    raise _error(
        f"{name} has one slice of unknown thickness",
        "several slices, or SliceThickness",
        "one slice",
        item,
        "Give the folder with all slices of the series.",
    )


def _check_twice(steps: Array, slices: Sequence[Slice], name: str) -> None:
    twice = np.flatnonzero(steps < SAME_PLACE_MM)
    if len(twice):
        first, second = slices[twice[0]], slices[twice[0] + 1]
        raise _error(
            f"{name} has several slices at one place",
            "one slice at each",
            f"{len(twice)} too many, such as {first.label} and {second.label}",
            second,
            "Remove copies; a series of several echoes or times must be parted first.",
        )


def _check_missing(
    steps: Array, usual: float, slices: Sequence[Slice], name: str
) -> None:
    gaps = np.flatnonzero(steps > MISSING * usual)
    if len(gaps):
        lost = int(np.rint(steps[gaps] / usual).sum()) - len(gaps)
        first = gaps[0]
        raise _error(
            f"{name} lacks slices",
            f"a slice every {usual:.4g} mm",
            f"{len(gaps)} gap{'s' if len(gaps) > 1 else ''} of about {lost} slices, "
            f"such as {steps[first]:.4g} mm between {slices[first].label} and "
            f"{slices[first + 1].label}",
            slices[first + 1],
            "Export or copy the series again.",
        )


def _check_straight(
    positions: FloatArray,
    axes: FloatArray,
    spacing: float,
    slices: Sequence[Slice],
    name: str,
) -> None:
    """Refuse slices that don't lie one above the other."""
    sideways = (positions - positions[0]) @ axes[:2].T
    drift = np.linalg.norm(sideways, axis=1)
    if drift.max() <= max(GRID_TOLERANCE_VOXELS * spacing, SAME_PLACE_MM):
        return
    rest = sideways - np.linspace(0, 1, len(sideways))[:, None] * sideways[-1]
    if np.linalg.norm(rest, axis=1).max() > 0.1 * drift.max():
        problem, found = "slices that are shifted", f"{drift.max():.3g} mm sideways"
    else:
        depth = (positions[-1] - positions[0]) @ axes[2]
        angle = np.degrees(np.arctan2(drift[-1], depth))
        problem, found = "a tilted gantry", f"a tilt of {angle:.2f} degrees"
    raise _error(
        f"{name} has {problem}",
        "slices straight above one another",
        found,
        slices[int(drift.argmax())],
        "Resample it onto a straight grid first, for example with dcm2niix.",
    )


def _error(
    problem: str, expected: str, found: str, item: Slice, remedy: str
) -> GeometryError:
    return GeometryError(
        describe(
            problem, expected=expected, found=found, file=str(item.file), remedy=remedy
        )
    )
