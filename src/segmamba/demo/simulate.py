"""A small BraTS on real anatomy, in the challenge's own folder layout."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from segmamba.demo.anatomy import make_anatomy
from segmamba.demo.contrasts import render, soft_lesions
from segmamba.demo.template import load_template
from segmamba.demo.tumour import draw_shape, grow, push_mm
from segmamba.errors import ConfigError, describe
from segmamba.io import Volume, write_label_map, write_volume
from segmamba.types import Array, FloatArray, Size3

Progress = Callable[[int, int, str], None]

FIELD_OF_VIEW_MM = (240, 240, 156)
"""Extent of the images along I, J, K, as in BraTS."""


def make_demo_dataset(
    folder: Path | str,
    *,
    cases: int = 16,
    seed: int = 0,
    spacing_mm: float = 2.0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write simulated glioma cases as BraTS 2023 lays them out.

    The brain is the MNI152 template, bent at random; the tumours are simulated. Good
    for showing that the software works, not for judging a method.

    Args:
        folder: Where the case folders go; made if missing.
        cases: How many, 1 or more.
        seed: The same seed gives the same voxels; each case has its own stream, so
            the first cases do not depend on how many there are.
        spacing_mm: Edge of the isotropic voxels, 1 to 4.
        workers: Threads; None for 2.
        progress: Called after each case with (done, total, case id).

    Returns:
        The folder, with BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz etc.
        and labels 1 necrotic, 2 oedema, 3 enhancing in `...-seg.nii.gz`.

    Raises:
        BackendUnavailableError: nilearn, which ships the template, is missing.
        ConfigError: An argument is out of range.
    """
    _check(cases, spacing_mm)
    folder = Path(folder)
    load_template()
    ids = [case_id(index) for index in range(cases)]
    pool = ThreadPoolExecutor(workers or 2)
    try:
        jobs = [
            pool.submit(_write_case, folder, index, seed, spacing_mm)
            for index in range(cases)
        ]
        for done, (job, name) in enumerate(zip(jobs, ids, strict=True), start=1):
            job.result()
            if progress is not None:
                progress(done, cases, name)
    finally:
        pool.shutdown(cancel_futures=True)
    return folder


def case_id(index: int) -> str:
    """Name a case as BraTS 2023 does, such as BraTS-GLI-00003-000."""
    return f"BraTS-GLI-{index:05d}-000"


def simulate_case(
    index: int, *, seed: int = 0, spacing_mm: float = 2.0
) -> tuple[dict[str, Array], Array, FloatArray]:
    """Simulate one case in memory.

    Args:
        index: Number of the case, from 0.
        seed: Seed of the data set.
        spacing_mm: Edge of the voxels in mm.

    Returns:
        Images by contrast, (I, J, K) int16; label map (I, J, K) uint8; affine.
    """
    size = grid_shape(spacing_mm)
    least = 1500 / spacing_mm**3
    for attempt in range(100):
        rng = np.random.default_rng([seed, index, attempt])
        shape = draw_shape(rng)
        push = push_mm(shape, size, spacing_mm)
        anatomy = make_anatomy(rng, size, spacing_mm, push)
        label, strength = grow(rng, shape, anatomy)
        core = np.isin(label, (1, 3))
        if core.sum() > least and (label == 2).sum() > least:
            break
    lesions = soft_lesions(rng, anatomy, label, strength)
    return render(rng, anatomy, lesions), label, brats_affine(size, spacing_mm)


def grid_shape(spacing_mm: float) -> Size3:
    """Give the voxels along I, J, K that cover the field of view."""
    i, j, k = (round(extent / spacing_mm) for extent in FIELD_OF_VIEW_MM)
    return i, j, k


def brats_affine(shape: Size3, spacing_mm: float) -> FloatArray:
    """Give BraTS's affine: stored to the left, back and up, corner at (0, J - 1, 0)."""
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing_mm
    return affine


def _write_case(folder: Path, index: int, seed: int, spacing_mm: float) -> None:
    name = case_id(index)
    images, label, affine = simulate_case(index, seed=seed, spacing_mm=spacing_mm)
    for channel, image in images.items():
        path = folder / name / f"{name}-{channel}.nii.gz"
        write_volume(path, Volume(image[None], affine))
    write_label_map(folder / name / f"{name}-seg.nii.gz", label, affine)


def _check(cases: int, spacing_mm: float) -> None:
    if cases < 1:
        raise ConfigError(describe("too few cases", expected="1 or more", found=cases))
    if not 1 <= spacing_mm <= 4:
        raise ConfigError(
            describe("bad spacing", expected="1 to 4 mm", found=f"{spacing_mm} mm")
        )
