"""Scans as large as BraTS's, of noise: what they cost to read is what counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.io import Volume, write_label_map, write_volume
from segmamba.types import Array, Size3

CHANNEL_NAMES = ("t1n", "t1c", "t2w", "t2f")
SCHEME = LabelScheme(
    {"background": 0, "necrotic core": 1, "oedema": 2, "enhancing tumour": 3}
)
SHAPE: Size3 = (240, 240, 155)
QUICK_SHAPE: Size3 = (26, 24, 20)
"""Voxels of a scan along I, J, K, 1 mm each."""

BRAIN = (0.31, 0.38, 0.45)
"""Half axes of the brain as shares of the scan's sides."""

TUMOUR = ((2, 0.16), (3, 0.10), (1, 0.06))
"""Labels of nested balls and their radii, in the same shares."""

AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def simulate_scans(folder: Path, shape: Size3, seed: int = 0) -> tuple[Path, ...]:
    """Write four noisy ellipsoids on zeros, as large as a brain, as int16.

    Args:
        folder: Where to; its name is the case's.
        shape: Voxels along I, J, K.
        seed: Of the noise.

    Returns:
        One file for each of `CHANNEL_NAMES`.
    """
    random = np.random.default_rng(seed)
    brain = _ball(shape, BRAIN) < 1
    files = []
    for name in CHANNEL_NAMES:
        image = random.standard_normal(shape, np.float32)
        image = (image * 80 + 500).astype(np.int16) * brain
        files.append(folder / f"{folder.name}-{name}.nii.gz")
        write_volume(files[-1], Volume(image[None], AFFINE))
    return tuple(files)


def simulate_dataset(folder: Path, shape: Size3, cases: int) -> Dataset:
    """Write cases with a tumour of three nested parts, several at a time.

    Args:
        folder: Where the case folders go.
        shape: Voxels along I, J, K.
        cases: How many.

    Returns:
        The data set.
    """

    def simulate(index: int) -> Case:
        name = f"case-{index:02d}"
        images = simulate_scans(folder / name, shape, index)
        label = np.zeros(shape, np.uint8)
        for value, radius in TUMOUR:
            label[_ball(shape, (radius, radius, radius)) < 1] = value
        path = folder / name / f"{name}-seg.nii.gz"
        write_label_map(path, label, AFFINE)
        return Case(name, images, path)

    with ThreadPoolExecutor() as pool:
        made = tuple(pool.map(simulate, range(cases)))
    return Dataset("simulated", folder, "brats", CHANNEL_NAMES, SCHEME, made)


def _ball(shape: Size3, half_axes: tuple[float, float, float]) -> Array:
    """Squared distance from the middle, 1 on an ellipsoid's surface."""
    axes = [
        (np.linspace(-0.5, 0.5, length, dtype=np.float32) / half) ** 2
        for length, half in zip(shape, half_axes, strict=True)
    ]
    return axes[0][:, None, None] + axes[1][:, None] + axes[2]
