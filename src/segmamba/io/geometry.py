"""Affines: whether they are usable, and how far two grids lie apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segmamba.errors import GeometryError, describe
from segmamba.types import FloatArray

GRID_TOLERANCE_VOXELS = 0.1
"""Two grids count as one if no corner differs by more than this."""

SMALLEST_MM, LARGEST_MM = 1e-6, 1e6
"""Voxels of no scan are smaller or larger than this."""

_SMALLEST_VOLUME_RATIO = 1e-6


def checked_affine(affine: object, path: Path | None = None) -> FloatArray:
    """Give an affine as float64, or say why it can't place voxels.

    Args:
        affine: (4, 4), voxel index to mm.
        path: The file it came from, for the error.

    Returns:
        The affine, (4, 4), float64.

    Raises:
        GeometryError: It isn't (4, 4), not finite, or singular, or its voxels are
            too small or too large for a scan's.
    """
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (4, 4):
        _refuse("bad affine", "shape (4, 4)", matrix.shape, path)
    if not np.isfinite(matrix).all():
        _refuse("the affine holds NaN or infinity", "finite numbers", matrix, path)
    with np.errstate(all="ignore"):  # numbers near the ends of their range
        norms = np.linalg.norm(matrix[:3, :3], axis=0)
        ratio = abs(np.linalg.det(matrix[:3, :3] / norms))
    if not ratio >= _SMALLEST_VOLUME_RATIO:  # or not a number
        _refuse("the affine is singular", "three independent axes", matrix, path)
    if norms.min() < SMALLEST_MM or norms.max() > LARGEST_MM:
        limits = f"{SMALLEST_MM:g} to {LARGEST_MM:g} mm"
        _refuse("the voxels have an impossible size", limits, norms, path)
    return matrix


def checked_sizes(sizes: Any, path: Path | None = None) -> FloatArray:
    """Give the voxel sizes that a header states, or refuse them.

    Args:
        sizes: Distances between voxels in mm, any number of them.
        path: The file, for the error.

    Returns:
        The same, float64.

    Raises:
        GeometryError: One is zero, negative or not finite: where such a voxel lies
            can't be told, and a sign says nothing reliable of a direction.
    """
    values = np.asarray(sizes, np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        _refuse("a voxel size is unusable", "sizes in mm above 0", values, path)
    return values


def _refuse(problem: str, expected: str, found: object, path: Path | None) -> None:
    text = " ".join(str(found).split())
    raise GeometryError(
        describe(
            problem,
            expected=expected,
            found=text,
            file=path,
            remedy="Write the header anew from the original scan.",
        )
    )


def grid_distance_mm(
    shape: Sequence[int], affine: FloatArray, other: FloatArray
) -> float:
    """Measure how far apart two affines put the same voxels.

    Args:
        shape: Voxels along I, J, K.
        affine: (4, 4), voxel index to mm.
        other: (4, 4), the one to compare with.

    Returns:
        The largest distance in mm over the centres of the eight corner voxels, which
        bounds that of every voxel.
    """
    ends = [(0.0, max(float(n) - 1.0, 1.0)) for n in shape]
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*ends)]).T
    gap = (np.asarray(affine) - np.asarray(other)) @ corners
    return float(np.linalg.norm(gap[:3], axis=0).max())


def describe_grid_difference(
    shape: Sequence[int],
    affine: FloatArray,
    other_shape: Sequence[int],
    other_affine: FloatArray,
) -> str | None:
    """Say by how much two grids differ.

    Args:
        shape: Voxels along I, J, K of the first.
        affine: (4, 4), its affine.
        other_shape: Voxels along I, J, K of the second.
        other_affine: (4, 4), its affine.

    Returns:
        A phrase such as "shape (3, 3, 3) instead of (4, 3, 3)" or one with the
        distance in mm and voxels; None if the grids are the same within
        `GRID_TOLERANCE_VOXELS`.
    """
    if tuple(shape) != tuple(other_shape):
        return f"shape {tuple(other_shape)} instead of {tuple(shape)}"
    distance = grid_distance_mm(shape, affine, other_affine)
    spacing = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    voxels = distance / float(spacing.min())
    if voxels <= GRID_TOLERANCE_VOXELS:
        return None
    return f"a corner {distance:.3g} mm ({voxels:.3g} voxels) away"
