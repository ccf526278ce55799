"""A scan in memory: voxels and where they lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from segmamba.errors import GeometryError, describe
from segmamba.types import Array, FloatArray, Size3, Spacing3


@dataclass(frozen=True)
class Volume:
    """Voxels of shape (C, I, J, K) and the affine that places them (RAS+, mm)."""

    array: Array
    """Voxels, channels first: (C, I, J, K)."""
    affine: FloatArray
    """(4, 4), float64: voxel index (i, j, k, 1) to (R, A, S, 1) in mm."""
    path: Path | None = None
    """The file it came from, for error texts."""

    def __post_init__(self) -> None:
        if self.array.ndim != 4:
            raise GeometryError(
                describe(
                    "bad volume shape",
                    expected="four axes (C, I, J, K)",
                    found=self.array.shape,
                    file=self.path,
                )
            )
        if np.shape(self.affine) != (4, 4):
            raise GeometryError(
                describe(
                    "bad affine",
                    expected="shape (4, 4)",
                    found=np.shape(self.affine),
                    file=self.path,
                )
            )

    @property
    def shape(self) -> Size3:
        """Voxels along I, J, K."""
        return cast(Size3, tuple(int(n) for n in self.array.shape[1:]))

    @property
    def spacing_mm(self) -> Spacing3:
        """Distance between neighbouring voxels along I, J, K in mm."""
        norms = np.linalg.norm(np.asarray(self.affine)[:3, :3], axis=0)
        return cast(Spacing3, tuple(float(n) for n in norms))
