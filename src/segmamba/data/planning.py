"""The rules behind a plan: pure functions from a data set's numbers to choices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from segmamba.config import NetworkConfig
from segmamba.data.fingerprint import CaseFingerprint, canonical
from segmamba.data.geometry import world_axes
from segmamba.data.resample import resampled_shape
from segmamba.types import Size3, Spacing3

ANISOTROPIC_RATIO = 3.0
"""An axis this many times coarser than the others is treated apart (nnU-Net's 3)."""
SMALLEST_SIDE = 3.75
"""Voxels that each axis keeps at the deepest level; fewer, and it isn't halved."""
MAX_VOXELS = {"cpu": 64**3, "cuda": 128**3}
"""Largest patch by device: 128^3 is the published one, 64^3 what a CPU can train."""

_DEFAULT_CODES = ("L", "P", "S")
_DEFAULT_ORDER = (2, 1, 0)


def choose_spacing(cases: Sequence[CaseFingerprint]) -> Spacing3:
    """Choose the voxel distance that all cases are resampled to.

    The median of each patient axis; but for an axis over three times as coarse as the
    others and with under a third of their voxels the tenth percentile, so that thick
    slices of some cases don't cost the thin ones of others (nnU-Net's rule).

    Args:
        cases: The cases.

    Returns:
        mm along (R-L, A-P, S-I).
    """
    spacings = np.array([canonical(c.spacing_mm, c.orientation) for c in cases])
    shapes = np.array([canonical(c.cropped_shape, c.orientation) for c in cases])
    spacing, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    coarse = int(np.argmax(spacing))
    others = [axis for axis in range(3) if axis != coarse]
    far_coarser = spacing[coarse] > ANISOTROPIC_RATIO * spacing[others].max()
    far_fewer = shape[coarse] * ANISOTROPIC_RATIO < shape[others].min()
    if far_coarser and far_fewer:
        finer = np.percentile(spacings[:, coarse], 10)
        spacing[coarse] = max(float(finer), float(spacing[others].max()))
    return cast(Spacing3, tuple(round(float(x), 6) for x in spacing))


def choose_orientation(spacing_mm: Spacing3) -> str:
    """Choose axis codes for (D, H, W): the clearly largest spacing first, else "SPL".

    Args:
        spacing_mm: Along (R-L, A-P, S-I).

    Returns:
        Three axis codes. S, P and L are the directions that the published pipeline
        feeds for BraTS.
    """
    order = list(_DEFAULT_ORDER)
    coarse = int(np.argmax(spacing_mm))
    second = sorted(spacing_mm)[1]
    if spacing_mm[coarse] > 1.2 * second:
        order = [coarse, *(axis for axis in order if axis != coarse)]
    return "".join(_DEFAULT_CODES[axis] for axis in order)


def to_tensor_axes(
    values: tuple[float, float, float], orientation: str
) -> tuple[float, float, float]:
    """Reorder values of (R-L, A-P, S-I) into (D, H, W).

    Args:
        values: One for each patient axis.
        orientation: Axis codes of (D, H, W).

    Returns:
        The same values in the order of the tensor's axes.
    """
    depth, height, width = world_axes(orientation)
    return values[depth], values[height], values[width]


def median_shape(
    cases: Sequence[CaseFingerprint], orientation: str, spacing_mm: Spacing3
) -> Size3:
    """Give the median size of the cases after crop and resampling.

    Args:
        cases: The cases.
        orientation: Axis codes of (D, H, W).
        spacing_mm: The plan's, along (D, H, W).

    Returns:
        Voxels along (D, H, W).
    """
    shapes = []
    for case in cases:
        size = canonical(case.cropped_shape, case.orientation)
        before = canonical(case.spacing_mm, case.orientation)
        shapes.append(
            resampled_shape(
                cast(Size3, to_tensor_axes(size, orientation)),
                to_tensor_axes(before, orientation),
                spacing_mm,
            )
        )
    return cast(Size3, tuple(round(float(n)) for n in np.median(shapes, axis=0)))


def choose_strides(
    size: Sequence[float], spacing_mm: Spacing3, stages: int
) -> tuple[Size3, ...]:
    """Choose the down-sampling in front of each stage.

    Each stage halves the axes that are long enough to keep 3.75 voxels, and of those
    only the ones whose spacing is under twice the finest: thick slices wait until the
    plane has become as coarse (nnU-Net's rule). Stages that could halve nothing fall
    away, but two are kept.

    Args:
        size: Voxels of the patch along (D, H, W); fractions are fine.
        spacing_mm: Along (D, H, W).
        stages: The most stages that the network has.

    Returns:
        One stride a stage.
    """
    sides, spacing = list(size), list(spacing_mm)
    strides: list[Size3] = []
    while len(strides) < stages:
        long = [axis for axis in range(3) if sides[axis] / 2 >= SMALLEST_SIDE]
        finest = min((spacing[axis] for axis in long), default=0.0)
        halved = {axis for axis in long if spacing[axis] < 2 * finest}
        if not halved and len(strides) >= 2:
            break
        stride = tuple(2 if axis in halved else 1 for axis in range(3))
        sides = [n / step for n, step in zip(sides, stride, strict=True)]
        spacing = [mm * step for mm, step in zip(spacing, stride, strict=True)]
        strides.append(cast(Size3, stride))
    return tuple(strides)


def choose_patch(
    median: Size3,
    spacing_mm: Spacing3,
    strides_for: Callable[[Sequence[float]], tuple[Size3, ...]],
    fits: Callable[[Size3, tuple[Size3, ...]], bool],
) -> tuple[Size3, tuple[Size3, ...]]:
    """Choose the largest patch that is as wide in mm along all axes and fits.

    No axis gets longer than the median case, rounded up to what the strides need; an
    axis that ends there leaves its share to the others.

    Args:
        median: Voxels of the median case along (D, H, W).
        spacing_mm: Along (D, H, W).
        strides_for: The strides for a size.
        fits: Whether a patch with these strides may be taken.

    Returns:
        Voxels along (D, H, W), multiples of the total strides, and the strides.
    """
    extent = max(n * mm for n, mm in zip(median, spacing_mm, strict=True))
    best: tuple[Size3, tuple[Size3, ...]] | None = None
    for step in range(1, 257):
        side_mm = extent * step / 256
        wanted = [
            min(n, side_mm / mm) for n, mm in zip(median, spacing_mm, strict=True)
        ]
        strides = strides_for(wanted)
        patch = round_to_strides(wanted, median, strides)
        if best is None:
            best = patch, strides  # the smallest one, whether it fits or not
        elif math.prod(patch) > math.prod(best[0]) and fits(patch, strides):
            best = patch, strides
    assert best is not None
    return best


def round_to_strides(
    wanted: Sequence[float], median: Size3, strides: Sequence[Size3]
) -> Size3:
    """Round a size to multiples of the total strides.

    Args:
        wanted: Voxels along (D, H, W).
        median: Voxels of the median case; an axis that reaches it is rounded up.
        strides: One stride a stage.

    Returns:
        Voxels along (D, H, W).
    """
    patch = []
    for axis, total in enumerate(total_strides(strides)):
        ratio = wanted[axis] / total
        count = math.ceil(ratio) if wanted[axis] >= median[axis] else round(ratio)
        patch.append(max(1, count) * total)
    return cast(Size3, tuple(patch))


def total_strides(strides: Sequence[Size3]) -> Size3:
    """Multiply the strides of all stages.

    Args:
        strides: One stride a stage.

    Returns:
        Voxels of the patch for one at the deepest level, along (D, H, W).
    """
    return cast(
        Size3, tuple(math.prod(stride[axis] for stride in strides) for axis in range(3))
    )


def choose_batch(
    patch_size: Size3,
    dataset_voxels: float,
    memory_for: Callable[[int], float],
    memory_mib: float,
) -> int:
    """Choose the largest batch that fits, two at least.

    Args:
        patch_size: Voxels along (D, H, W).
        dataset_voxels: Voxels of all cases together, after crop and resampling; a
            batch takes a twentieth of them at most (nnU-Net's rule).
        memory_for: MiB of a training step with a batch of this size.
        memory_mib: MiB that may be filled.

    Returns:
        Patches in a batch.
    """
    limit = max(2, int(0.05 * dataset_voxels / math.prod(patch_size)))
    one, two = memory_for(1), memory_for(2)
    by_memory = 2 + int(max(0.0, memory_mib - two) / max(two - one, 1e-6))
    return min(limit, by_memory)


def adapt_network(
    network: NetworkConfig,
    strides: tuple[Size3, ...],
    in_channels: int,
    out_channels: int,
) -> NetworkConfig:
    """Fit a preset to a data set: its channels, and one stage for each stride.

    Args:
        network: The preset's configuration.
        strides: One stride for each stage that is kept; the deepest ones fall away.
        in_channels: Image channels.
        out_channels: Channels of the logits.

    Returns:
        The configuration; the deepest block keeps its width relative to the last stage.
    """
    stages = len(strides)
    ratio = network.hidden_size / network.dims[-1]
    blocks = network.conv_blocks
    return dataclasses.replace(
        network,
        in_channels=in_channels,
        out_channels=out_channels,
        strides=strides,
        dims=network.dims[:stages],
        depths=network.depths[:stages],
        conv_blocks=None if blocks is None else blocks[:stages],
        num_slices=network.num_slices and network.num_slices[:stages],
        hidden_size=round(ratio * network.dims[stages - 1]),
    )
