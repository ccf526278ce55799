"""Random smooth fields: what deforms brains, bends borders and shades images."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from scipy import ndimage

from segmamba.types import Array, FloatArray, Size3


def smooth_field(
    rng: np.random.Generator, shape: Size3, spacing_mm: float, length_mm: float
) -> FloatArray:
    """Draw a Gaussian random field of zero mean and unit variance.

    White noise on a coarse grid is spread with a separable Gaussian whose rows have
    unit norm, so the variance is 1 everywhere and three small matrix products do it.

    Args:
        rng: Source of the numbers.
        shape: Voxels along the three axes.
        spacing_mm: Edge of a voxel in mm.
        length_mm: Standard deviation of the Gaussian in mm; features are about
            twice as large.

    Returns:
        Array of `shape`, float32.
    """
    weights = [_spread(n, spacing_mm / length_mm) for n in shape]
    noise = rng.standard_normal(tuple(w.shape[1] for w in weights), dtype=np.float32)
    noise = np.tensordot(noise, weights[2], axes=(2, 1))
    noise = np.tensordot(weights[1], noise, axes=(1, 1)).transpose(1, 0, 2)
    return np.tensordot(weights[0], noise, axes=(1, 0))


def _spread(size: int, step: float) -> FloatArray:
    """Rows of a Gaussian at `size` places, on nodes one length apart: (size, nodes)."""
    places = np.arange(size)[:, None] * step
    nodes = np.arange(-4, np.ceil(size * step) + 5)[None]
    weights = np.exp(-0.5 * (places - nodes) ** 2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return weights.astype(np.float32)


def ramp(values: FloatArray, low: float, high: float) -> FloatArray:
    """Rise linearly from 0 at `low` to 1 at `high`, constant outside."""
    return np.clip((values - low) / (high - low), 0, 1)


def distance_mm(mask: Array, spacing_mm: float) -> FloatArray:
    """Distance in mm of every voxel of the mask to the nearest one outside it."""
    voxels = cast(Any, ndimage.distance_transform_edt(mask))
    return (voxels * spacing_mm).astype(np.float32)


def bounding_box(mask: Array) -> tuple[slice, slice, slice]:
    """Smallest box around a mask (I, J, K) that isn't empty."""
    return cast(Any, ndimage.find_objects(mask.astype(np.uint8))[0])


def largest_piece(mask: Array) -> Array:
    """Largest face-connected piece of a mask (I, J, K), of the same shape."""
    pieces, count = cast(Any, ndimage.label(mask))
    if count < 2:
        return mask
    return pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))


def fill_holes(mask: Array) -> Array:
    """Add to a mask (I, J, K) what the outside can't reach through faces.

    The same as scipy's binary_fill_holes, which grows the outside step by step; one
    labelling of the complement is several times as fast.
    """
    outside, count = cast(Any, ndimage.label(np.pad(~mask, 1, constant_values=True)))
    if count < 2:
        return mask
    return (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]
