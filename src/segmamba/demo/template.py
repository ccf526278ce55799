"""The anatomy under the simulated tumours: the MNI152 brain that nilearn ships."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from segmamba.demo.fields import distance_mm
from segmamba.errors import BackendUnavailableError, describe
from segmamba.io import read_volume
from segmamba.types import Array, FloatArray

_NAME = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


@dataclass(frozen=True)
class Template:
    """Maps of the template brain on its own grid (1 mm)."""

    maps: FloatArray
    """(4, I, J, K), float32 in 0 to 1: brain, grey matter, white matter, T1."""
    affine: Array
    """(4, 4): voxel index to RAS+ mm."""


def template_folder() -> Path:
    """Find the folder of nilearn's package data without importing nilearn.

    Returns:
        The folder that holds the MNI152 files.

    Raises:
        BackendUnavailableError: nilearn is not installed, or ships no such files.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "datasets" / "data"
        if all((folder / _NAME.format(kind)).is_file() for kind in ("t1", "gm", "wm")):
            return folder
    raise BackendUnavailableError(
        describe(
            "the demo needs the MNI152 brain that nilearn ships",
            expected="nilearn with its package data",
            found="no nilearn" if spec is None else "a nilearn without these files",
            remedy="Install it with: pip install 'segmamba[demo]'",
        )
    )


@functools.lru_cache(maxsize=1)
def load_template() -> Template:
    """Read the template brain once.

    Returns:
        Its maps, slightly smoothed so that 2 mm voxels sample them without aliasing.

    Raises:
        BackendUnavailableError: nilearn is not installed.
    """
    folder = template_folder()
    volumes = [
        read_volume(folder / _NAME.format(kind), dtype=np.float32)
        for kind in ("gm", "wm", "t1")
    ]
    gm, wm, t1 = (volume.array[0] / np.float32(255) for volume in volumes)
    brain = _brain_mask(gm + wm)
    maps = np.stack([brain, gm * brain, wm * brain, t1 * brain])
    smooth = [ndimage.gaussian_filter(item, 0.7) for item in maps]
    return Template(np.stack(smooth), volumes[0].affine)


def _brain_mask(tissue: FloatArray) -> FloatArray:
    """Close sulci and ventricles over grey and white matter, at 2 mm for speed."""
    margin = 8
    seed = np.pad(tissue[::2, ::2, ::2] > 0.3, margin)
    closed = distance_mm(distance_mm(~seed, 2.0) <= 6, 2.0) > 6
    filled = np.asarray(ndimage.binary_fill_holes(closed)).astype(np.float32)
    for axis, size in enumerate(tissue.shape):
        filled = np.repeat(filled, 2, axis)
        filled = np.take(filled, range(2 * margin, 2 * margin + size), axis)
    return np.asarray(ndimage.gaussian_filter(filled, 1.0))
