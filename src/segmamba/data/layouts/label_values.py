"""Which integers occur in label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmamba.io import read_volume
from segmamba.types import Array

_LARGEST_COUNTED = 1 << 16


def count_values(array: Array) -> dict[float, int]:
    """Count how often each value occurs.

    Args:
        array: Numbers of any shape.

    Returns:
        Value to number of voxels, ascending; not-a-numbers are left out.
    """
    flat = array.ravel(order="K")
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return {}
    if flat.dtype.kind in "iu" and flat.min() >= 0 and flat.max() < _LARGEST_COUNTED:
        foreground = flat[flat != 0]  # few: cheap to count
        counts = np.bincount(foreground, minlength=1)
        counts[0] = flat.size - foreground.size
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(flat, return_counts=True)
    return {float(value): int(n) for value, n in zip(values, counts, strict=True)}


def read_label_values(path: Path) -> set[int]:
    """Read which integers a label map holds.

    Args:
        path: The label map.

    Returns:
        The integers; fractions are left out.

    Raises:
        FormatError: The file can't be read.
        GeometryError: Its affine is unusable.
    """
    counts = count_values(read_volume(path).array)
    return {int(value) for value in counts if value == int(value)}
