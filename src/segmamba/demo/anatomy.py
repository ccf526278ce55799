"""One random brain: the template bent, turned, scaled and perhaps mirrored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segmamba.demo.fields import distance_mm, smooth_field
from segmamba.demo.template import load_template
from segmamba.types import Array, FloatArray, Size3

_CENTRE_MM = np.array([0.0, -18.0, 4.0])
"""Middle of the template's brain (RAS+ mm)."""


@dataclass(frozen=True)
class Anatomy:
    """Tissue of one brain on the output grid; axes run to L, P and S."""

    brain: Array
    """(I, J, K) bool: the skull-stripped mask."""
    csf: FloatArray
    """(I, J, K) float32, share of fluid in each voxel."""
    gm: FloatArray
    """(I, J, K) float32, share of grey matter."""
    wm: FloatArray
    """(I, J, K) float32, share of white matter."""
    detail: FloatArray
    """(I, J, K) float32, what the template's T1 shows beyond the tissue maps."""
    depth_mm: FloatArray
    """(I, J, K) float32, distance to the outside of the brain in mm."""
    spacing_mm: float
    """Edge of a voxel."""


def grid_mm(shape: Size3, spacing_mm: float) -> FloatArray:
    """Give the places of voxels relative to the grid's middle: (3, I, J, K), RAS+ mm.

    The grid is stored as BraTS stores it: axes run to the left, to the back and up.
    """
    signs = (-1, -1, 1)
    axes = [
        sign * spacing_mm * (np.arange(n) - (n - 1) / 2)
        for sign, n in zip(signs, shape, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def make_anatomy(
    rng: np.random.Generator,
    shape: Size3,
    spacing_mm: float,
    push_mm: FloatArray | None = None,
) -> Anatomy:
    """Draw a brain.

    Args:
        rng: Source of the numbers.
        shape: Voxels of the output grid.
        spacing_mm: Edge of a voxel in mm.
        push_mm: (3, I, J, K) how far a growing tumour moved the tissue, RAS+ mm.

    Returns:
        Tissue shares on the output grid.
    """
    places = grid_mm(shape, spacing_mm)
    if push_mm is not None:
        places = places - push_mm
    template = load_template()
    places = _bend(rng, places, shape, spacing_mm)
    places += _CENTRE_MM[:, None, None, None].astype(np.float32)
    scale = np.diag(template.affine)[:3, None, None, None]
    offset = template.affine[:3, 3][:, None, None, None]
    index = ((places - offset) / scale).astype(np.float32)
    brain, gm, wm, t1 = (
        ndimage.map_coordinates(item, index, order=1) for item in template.maps
    )
    return _individual(rng, brain > 0.5, gm, wm, t1, spacing_mm)


def _bend(
    rng: np.random.Generator, places: FloatArray, shape: Size3, spacing_mm: float
) -> FloatArray:
    """Turn, scale, mirror and warp the sampling places."""
    angles = rng.normal(0, np.deg2rad(4), 3)
    matrix = _rotation(angles) @ np.diag(1 / rng.normal([0.97, 0.97, 0.95], 0.035))
    if rng.random() < 0.5:
        matrix[:, 0] *= -1
    shift = rng.normal(0, 3, 3)[:, None, None, None]
    bent = np.tensordot(matrix.astype(np.float32), places + shift, axes=(1, 0))
    for length, size in ((35.0, 3.0), (14.0, 1.8)):
        for axis in range(3):
            bent[axis] += size * smooth_field(rng, shape, spacing_mm, length)
    return bent.astype(np.float32)


def _rotation(angles: FloatArray) -> FloatArray:
    (a, b, c), eye = angles, np.eye(3)
    result = eye
    for angle, (i, j) in zip((a, b, c), ((1, 2), (0, 2), (0, 1)), strict=True):
        turn = eye.copy()
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        result = result @ turn
    return result


def _individual(
    rng: np.random.Generator,
    brain: Array,
    gm: FloatArray,
    wm: FloatArray,
    t1: FloatArray,
    spacing_mm: float,
) -> Anatomy:
    """Sharpen the average of 152 brains into one person's with its own folds."""
    csf = np.clip(1 - gm - wm, 0, 1)
    detail = t1 - (0.30 * csf + 0.66 * gm + 0.88 * wm)
    shares = []
    for share in (csf, gm, wm):
        own = np.exp(0.35 * smooth_field(rng, share.shape, spacing_mm, 2.5))
        shares.append((share + 1e-3) ** 1.8 * own)
    total = sum(shares)
    csf, gm, wm = (share / total * brain for share in shares)
    depth = distance_mm(brain, spacing_mm)
    return Anatomy(brain, csf, gm, wm, detail * brain, depth, spacing_mm)
