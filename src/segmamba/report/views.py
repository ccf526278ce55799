"""Three planes of a volume, turned the way radiologists look at them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segmamba.types import Array, FloatArray, Size3, Spacing3


@dataclass(frozen=True)
class Plane:
    """One anatomical plane and how it lies on the page."""

    name: str
    """axial, coronal or sagittal."""
    axis: int
    """Axis of the turned array (L, A, S) that the plane cuts across."""
    edges: tuple[str, str, str, str]
    """Letters at the left, right, top and bottom edge."""


PLANES = (
    Plane("axial", 2, ("R", "L", "A", "P")),
    Plane("coronal", 1, ("R", "L", "S", "I")),
    Plane("sagittal", 0, ("A", "P", "S", "I")),
)
"""Radiological convention: the patient's left is at the right edge."""


@dataclass(frozen=True)
class Turned:
    """An array whose axes run to the left, the front and above."""

    array: Array
    """(I, J, K), axes nearest to L, A and S."""
    spacing_mm: Spacing3
    """Edges of its voxels."""

    def cut(self, plane: Plane, index: int) -> Array:
        """Give a plane as (rows, columns), ready for the page with row 0 on top."""
        section = np.take(self.array, index, axis=plane.axis).T[::-1]
        return section[:, ::-1] if plane.name == "sagittal" else section

    def shape_on_page(self, plane: Plane) -> float:
        """Give the height of a plane over its width, in mm."""
        column, row = (axis for axis in range(3) if axis != plane.axis)
        extent = np.array(self.array.shape) * self.spacing_mm
        return float(extent[row] / extent[column])

    def aspect(self, plane: Plane) -> float:
        """Give the height of a pixel over its width."""
        column, row = (
            mm for axis, mm in enumerate(self.spacing_mm) if axis != plane.axis
        )
        return row / column


def turn(array: Array, affine: FloatArray) -> Turned:
    """Permute and flip axes so that they run to the left, the front and above.

    Args:
        array: (I, J, K).
        affine: (4, 4): voxel index to RAS+ mm. Oblique axes go to the nearest one.

    Returns:
        A view of the array; no voxel is interpolated.
    """
    matrix = np.asarray(affine, np.float64)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    order = nearest_axes(matrix / spacing)
    turned = np.transpose(array, order)
    for world, axis in enumerate(order):
        runs_up = matrix[world, axis] > 0
        wants_up = world != 0  # to the left is down the R axis
        if runs_up != wants_up:
            turned = np.flip(turned, world)
    i, j, k = (float(spacing[axis]) for axis in order)
    return Turned(turned, (i, j, k))


def nearest_axes(directions: FloatArray) -> Size3:
    """Choose for R, A and S the voxel axis that runs most along it.

    Args:
        directions: (3, 3), columns are the unit vectors of the voxel axes.

    Returns:
        Three different axes, chosen from the clearest to the least clear.
    """
    left = np.abs(directions).copy()
    order = [0, 0, 0]
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(left)), left.shape)
        order[int(world)] = int(axis)
        left[world, :], left[:, axis] = -1, -1
    return order[0], order[1], order[2]


def section_indices(label_map: Array) -> Size3:
    """Choose along each axis the section that shows most of all labels.

    Args:
        label_map: (I, J, K) integers; 0 is background.

    Returns:
        One index an axis. With one label it is the largest section; with several,
        each counts by its share of its own largest section, so that small ones are
        seen too. The middle if there is no label.
    """
    scores = [np.zeros(n) for n in label_map.shape]
    for value in np.unique(label_map[label_map != 0]):
        mask = label_map == value
        for axis, axes in enumerate(((1, 2), (0, 2), (0, 1))):
            area = np.count_nonzero(mask, axis=axes)
            scores[axis] += area / area.max()
    i, j, k = (
        int(np.argmax(score)) if score.any() else score.size // 2 for score in scores
    )
    return i, j, k
