"""A label map on the grid of its scan, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from segmamba.errors import ConfigError, describe
from segmamba.inference.uncertainty import MAPS, Uncertainty
from segmamba.io import Volume, write_label_map, write_volume
from segmamba.types import Array, FloatArray, Spacing3


@dataclass(frozen=True)
class Prediction:
    """A label map on the grid of the scan it was made from."""

    label_map: Array
    """(I, J, K), the data set's integers, in the scan's own axis order."""
    affine: FloatArray
    """(4, 4), the scan's: voxel index to RAS+ mm."""
    probabilities: Array | None = None
    """float16 (K, I, J, K), one for each of `names`, if asked for."""
    names: tuple[str, ...] = ()
    """The network's outputs: regions, or classes with the background first."""
    source: Path | None = None
    """The scan's (first) file."""
    uncertainty: Uncertainty | None = None
    """How sure it is, if asked for; before any post-processing."""

    @property
    def spacing_mm(self) -> Spacing3:
        """Distance between neighbouring voxels along I, J, K in mm."""
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        return cast(Spacing3, tuple(float(n) for n in lengths))

    def save(self, path: str | Path) -> Path:
        """Write the label map atomically, in the format that the path's ending names.

        Args:
            path: Such as case.nii.gz; the folder is made if it is missing.

        Returns:
            The path.
        """
        path = Path(path)
        like = self.source if self.source and self.source.is_file() else None
        write_label_map(path, self.label_map, self.affine, like=like)
        return path

    def save_probabilities(self, path: str | Path) -> Path:
        """Write the probabilities atomically as one 4D file, outputs last.

        Args:
            path: Such as case_probabilities.nii.gz.

        Returns:
            The path.

        Raises:
            ConfigError: The prediction was made without probabilities.
        """
        if self.probabilities is None:
            raise ConfigError(
                describe(
                    "there are no probabilities to save",
                    remedy="Predict with probabilities=True.",
                )
            )
        return self._save_map(path, self.probabilities)

    def save_uncertainty(self, path: str | Path, kind: str) -> Path:
        """Write one map of uncertainty atomically.

        Args:
            path: Such as case_entropy.nii.gz.
            kind: "entropy", "mutual_information" or "confidence".

        Returns:
            The path.

        Raises:
            ConfigError: The prediction was made without uncertainty, or there is no
                such map.
        """
        if self.uncertainty is None or kind not in MAPS:
            raise ConfigError(
                describe(
                    "there is no such map of uncertainty to save",
                    expected=", ".join(MAPS),
                    found=kind,
                    remedy="Predict with uncertainty=True.",
                )
            )
        return self._save_map(path, getattr(self.uncertainty, kind)[None])

    def _save_map(self, path: str | Path, maps: Array) -> Path:
        path = Path(path)
        # No format of ours has 16-bit floats.
        write_volume(path, Volume(maps.astype(np.float32), self.affine))
        return path
