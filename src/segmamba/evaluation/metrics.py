"""Overlap, surface distances and volumes of two masks, in mm.

Empty masks follow one rule everywhere: both empty is perfect agreement (Dice 1,
distance 0, surface Dice 1); one empty is none at all (Dice 0, surface Dice 0, and the
distance is a penalty that the caller states).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy

from segmamba.errors import GeometryError, describe
from segmamba.types import Array, FloatArray, Spacing3

PERCENTILE = 95.0


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm between the border voxels of two masks that aren't empty."""

    to_reference: FloatArray
    """(borders of the prediction,) from each to the reference's nearest border."""
    to_prediction: FloatArray
    """(borders of the reference,) from each to the prediction's nearest border."""


def dice(prediction: Array, reference: Array) -> float:
    """Compute 2 |P and R| / (|P| + |R|).

    Args:
        prediction: Mask, any shape.
        reference: Mask of the same shape.

    Returns:
        0 to 1; 1 if both are empty.

    Raises:
        GeometryError: The shapes differ.
    """
    prediction, reference = as_masks(prediction, reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    if total == 0:
        return 1.0
    return float(2.0 * np.count_nonzero(prediction & reference) / total)


def volume_ml(mask: Array, spacing_mm: Spacing3) -> float:
    """Compute the volume of a mask.

    Args:
        mask: Any shape.
        spacing_mm: Edges of a voxel in mm.

    Returns:
        Millilitres (cubic centimetres).
    """
    return float(np.count_nonzero(mask) * np.prod(spacing_mm) / 1000.0)


def diagonal_mm(shape: tuple[int, ...], spacing_mm: Spacing3) -> float:
    """Give the image's diagonal in mm: no distance in it can be larger."""
    return float(np.linalg.norm(np.asarray(shape) * np.asarray(spacing_mm)))


def surface_distances(
    prediction: Array, reference: Array, spacing_mm: Spacing3
) -> SurfaceDistances | None:
    """Measure how far the borders of two masks lie from each other.

    A border voxel belongs to the mask and has one of its six neighbours outside;
    beyond the image's edge everything is outside. Distances run between the centres
    of border voxels. Exact.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.

    Returns:
        The distances, or None if a mask is empty.

    Raises:
        GeometryError: The shapes differ.

    Source:
        The border's definition is medpy's and MONAI's.
    """
    prediction, reference = as_masks(prediction, reference)
    if not prediction.any() or not reference.any():
        return None
    box = bounding_box(prediction | reference)
    points_p, points_r = (
        _border_points_mm(mask[box], spacing_mm) for mask in (prediction, reference)
    )
    return SurfaceDistances(
        to_reference=_nearest(points_r, points_p),
        to_prediction=_nearest(points_p, points_r),
    )


def hd95(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    *,
    penalty_mm: float | None = None,
) -> float:
    """Compute the 95th percentile of the distances of both directions pooled.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.
        penalty_mm: Result if one mask is empty; None for the image's diagonal.

    Returns:
        Millimetres; 0 if both masks are empty.

    Source:
        The definition of medpy, which the SegMamba paper reports.
    """
    distances = surface_distances(prediction, reference, spacing_mm)
    if distances is None:
        return _empty_distance(prediction, reference, spacing_mm, penalty_mm)
    return pooled_percentile(distances)


def hd95_max(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    *,
    penalty_mm: float | None = None,
) -> float:
    """Compute the larger of the two directed 95th percentiles.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.
        penalty_mm: Result if one mask is empty; None for the image's diagonal.

    Returns:
        Millimetres; 0 if both masks are empty.

    Source:
        The definition of MONAI's HausdorffDistanceMetric(percentile=95).
    """
    distances = surface_distances(prediction, reference, spacing_mm)
    if distances is None:
        return _empty_distance(prediction, reference, spacing_mm, penalty_mm)
    return directed_percentile(distances)


def surface_dice(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    *,
    tolerance_mm: float = 1.0,
) -> float:
    """Compute the share of both borders that lies within a tolerance of the other.

    Border voxels are counted; they are not weighed by the area they stand for.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.
        tolerance_mm: Largest distance that counts as agreement, 0 or more.

    Returns:
        0 to 1; 1 if both are empty, 0 if one is.

    Source:
        Nikolov et al., arXiv:1809.04430; counted in voxels as by MONAI's default.
    """
    distances = surface_distances(prediction, reference, spacing_mm)
    if distances is None:
        return float(not np.any(prediction) and not np.any(reference))
    return share_within(distances, tolerance_mm)


def pooled_percentile(distances: SurfaceDistances) -> float:
    """95th percentile in mm of the distances of both directions together."""
    both = np.concatenate([distances.to_reference, distances.to_prediction])
    return float(np.percentile(both, PERCENTILE))


def directed_percentile(distances: SurfaceDistances) -> float:
    """Larger of the 95th percentiles in mm of the two directions."""
    ways = (distances.to_reference, distances.to_prediction)
    return max(float(np.percentile(way, PERCENTILE)) for way in ways)


def share_within(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Share (0 to 1) of the border voxels of both masks within `tolerance_mm`."""
    ways = (distances.to_reference, distances.to_prediction)
    near = sum(np.count_nonzero(way <= tolerance_mm) for way in ways)
    return float(near / sum(way.size for way in ways))


def _empty_distance(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    penalty_mm: float | None,
) -> float:
    if not np.any(prediction) and not np.any(reference):
        return 0.0
    if penalty_mm is not None:
        return penalty_mm
    return diagonal_mm(np.shape(reference), spacing_mm)


def as_masks(prediction: Array, reference: Array) -> tuple[Array, Array]:
    """Turn both into boolean arrays, and see that their shapes agree.

    Args:
        prediction: Any shape; everything but 0 is inside.
        reference: The same shape.

    Returns:
        Prediction and reference.

    Raises:
        GeometryError: The shapes differ.
    """
    if np.shape(prediction) != np.shape(reference):
        raise GeometryError(
            describe(
                "masks of different shapes can't be compared",
                expected=f"{np.shape(reference)} as the reference",
                found=np.shape(prediction),
            )
        )
    return np.asarray(prediction, bool), np.asarray(reference, bool)


def bounding_box(mask: Array) -> tuple[slice, ...]:
    """Bounding box of a mask that isn't empty; found axis by axis, which is fast."""
    slices = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        places = np.flatnonzero(mask.any(axis=others))
        slices.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(slices)


def _border_points_mm(mask: Array, spacing_mm: Spacing3) -> FloatArray:
    """Places (n, 3) in mm of the mask's voxels with a face on the outside."""
    padded = np.pad(mask, 1)
    inside: Array = np.asarray(scipy.ndimage.binary_erosion(padded), bool)
    return np.argwhere(padded & ~inside) * np.asarray(spacing_mm, np.float64)


def _nearest(places: FloatArray, queries: FloatArray) -> FloatArray:
    """Distance (n,) of each query to the nearest place.

    A search tree of the borders is 2 to 10 times as fast as a distance transform of
    the box, and stray voxels far off, which make the box large, cost it nothing.
    """
    tree = scipy.spatial.KDTree(places, balanced_tree=False, compact_nodes=False)
    return cast(Any, tree.query(queries)[0])
