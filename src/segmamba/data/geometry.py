"""Where a scan's axes point, and all that is needed to undo preprocessing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from segmamba.config import from_dict, to_dict
from segmamba.errors import ConfigError, GeometryError, describe
from segmamba.types import Array, FloatArray, JsonDict, Size3, Spacing3

POSITIVE_CODES = "RAS"
NEGATIVE_CODES = "LPI"

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and the one after the last, along three axes."""


def axis_codes(affine: FloatArray) -> str:
    """Say where each voxel axis points to, such as "LPS".

    Of the six ways to give the three axes to left-right, posterior-anterior and
    inferior-superior, the one that turns the axes least is taken, so oblique and
    sheared affines get three different codes.

    Args:
        affine: (4, 4), voxel index to RAS+ mm.

    Returns:
        Three letters of R/L, A/P, S/I: the direction in which I, J, K grow.

    Raises:
        GeometryError: The affine doesn't span three dimensions.
    """
    matrix = np.asarray(affine, np.float64)[:3, :3]
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.all(np.isfinite(matrix)) or np.linalg.matrix_rank(matrix) < 3:
        raise GeometryError(
            describe(
                "the affine doesn't span three dimensions",
                expected="three independent, finite columns",
                found=matrix.tolist(),
            )
        )
    left, _, right = np.linalg.svd(matrix / lengths)
    rotation = left @ right  # the nearest rotation: shear must not tip the choice
    worlds = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(rotation[order[axis], axis]) for axis in range(3)),
    )
    return "".join(
        (POSITIVE_CODES if rotation[world, axis] > 0 else NEGATIVE_CODES)[world]
        for axis, world in enumerate(worlds)
    )


def world_axes(codes: str) -> Size3:
    """Give the patient axis (0 R-L, 1 A-P, 2 S-I) of each of three axis codes.

    Args:
        codes: Three letters such as "SPL".

    Returns:
        Three different integers of 0, 1, 2.

    Raises:
        ConfigError: The codes aren't three letters, one of each pair.
    """
    axes = [max(POSITIVE_CODES.find(c), NEGATIVE_CODES.find(c)) for c in codes]
    if sorted(axes) != [0, 1, 2]:
        raise ConfigError(
            describe(
                "bad orientation",
                expected="three letters, one each of R/L, A/P and S/I, such as SPL",
                found=repr(codes),
            )
        )
    return cast(Size3, tuple(axes))


def axis_transform(source: str, target: str) -> tuple[Size3, tuple[bool, bool, bool]]:
    """Give the transposition and the flips from one orientation to another.

    Args:
        source: Axis codes of the array as it is, such as "LPS".
        target: Axis codes wanted, such as "SPL".

    Returns:
        For each target axis the source axis that becomes it, and whether it is
        then reversed.
    """
    source_axes, target_axes = world_axes(source), world_axes(target)
    order = tuple(source_axes.index(axis) for axis in target_axes)
    flips = tuple(
        source[axis] != code for axis, code in zip(order, target, strict=True)
    )
    return cast(Size3, order), cast("tuple[bool, bool, bool]", flips)


@dataclass(frozen=True)
class Geometry:
    """What preprocessing did to a scan's grid: enough to undo it. JSON-able."""

    original_shape: Size3
    """Voxels of the file along (I, J, K)."""
    affine: tuple[tuple[float, float, float, float], ...]
    """The file's affine (4 x 4), RAS+ mm."""
    axis_order: Size3
    """For each of D, H, W the file axis that became it."""
    axis_flips: tuple[bool, bool, bool]
    """Whether D, H, W was reversed after the transposition."""
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """Box that was kept, along D, H, W before resampling: [start, stop)."""
    shape: Size3
    """Voxels along D, H, W after resampling."""

    @property
    def cropped_shape(self) -> Size3:
        """Voxels along D, H, W after the crop, before resampling."""
        return cast(Size3, tuple(stop - start for start, stop in self.crop))

    @property
    def crop_slices(self) -> tuple[slice, slice, slice]:
        """The crop box as slices along D, H, W."""
        return cast(Any, tuple(slice(start, stop) for start, stop in self.crop))

    @property
    def spacing_mm(self) -> Spacing3:
        """Voxel distance along D, H, W after resampling, in mm."""
        lengths = np.linalg.norm(np.asarray(self.affine)[:3, :3], axis=0)
        return cast(
            Spacing3,
            tuple(
                float(lengths[axis]) * before / after
                for axis, before, after in zip(
                    self.axis_order, self.cropped_shape, self.shape, strict=True
                )
            ),
        )

    def orient(self, array: Array) -> Array:
        """View an array (..., I, J, K) as (..., D, H, W)."""
        return orient_array(array, self.axis_order, self.axis_flips)

    def to_dict(self) -> JsonDict:
        """Give plain values for JSON."""
        return to_dict(self)

    @classmethod
    def from_dict(
        cls, data: JsonDict, *, source: str | Path = "a geometry"
    ) -> Geometry:
        """Build it from plain values.

        Raises:
            ConfigError: A value is missing, unknown or of the wrong type.
        """
        return from_dict(cls, data, source=str(source))


def orient_array(
    array: Array, axis_order: Size3, axis_flips: tuple[bool, bool, bool]
) -> Array:
    """Transpose and flip the last three axes of an array, without a copy.

    Args:
        array: (..., I, J, K).
        axis_order: For each axis of the result the source axis.
        axis_flips: Whether each axis of the result is reversed.

    Returns:
        A view (..., D, H, W).
    """
    lead = array.ndim - 3
    turned = array.transpose(*range(lead), *(lead + axis for axis in axis_order))
    return turned[(..., *_flip_slices(axis_flips))]


def nonzero_box(array: Array) -> Box:
    """Find the bounding box of the voxels that aren't zero in every channel.

    Args:
        array: (C, D, H, W).

    Returns:
        The box along D, H, W; the whole grid if everything is zero.
    """
    shape = array.shape[1:]
    found = [np.zeros(n, bool) for n in shape]
    for channel in array:
        mask = channel != 0
        plane = mask.any(axis=0)
        found[0] |= mask.any(axis=(1, 2))
        found[1] |= plane.any(axis=1)
        found[2] |= plane.any(axis=0)
    spans = [np.flatnonzero(line) for line in found]
    if any(len(span) == 0 for span in spans):
        return cast(Box, tuple((0, int(n)) for n in shape))
    return cast(Box, tuple((int(span[0]), int(span[-1]) + 1) for span in spans))


def _flip_slices(flips: tuple[bool, bool, bool]) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if flip else None) for flip in flips)
