"""Training patches out of the cache: a pure function of a seed and a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from segmamba.config import AugmentationConfig
from segmamba.data.augment import Batch, SpatialDraw, draw_spatial, generator
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, describe
from segmamba.types import Array, Size3

_OPEN_CASES = 64
"""Cases kept open; each holds two file handles."""
_TRIES = 32
"""Voxels looked at in search of an annotated one."""


class CaseArrays(Protocol):
    """What the sampler needs of a cached case."""

    @property
    def image(self) -> Array:
        """(C, D, H, W), memory-mapped."""
        ...

    @property
    def label(self) -> Array:
        """(D, H, W) integers, memory-mapped."""
        ...

    @property
    def foreground(self) -> Mapping[int, Array]:
        """Label value to some of its voxels (n, 3)."""
        ...


class CaseSource(Protocol):
    """Anything that loads cases by id, such as `segmamba.data.cache.Cache`."""

    def load(self, case_id: str) -> CaseArrays:
        """Open a case."""
        ...


class PatchSampler:
    """Batches of patches, reading no more of each case than it must.

    As in nnU-Net, each sample picks a case at random; the last ones of a batch are
    centred on a voxel of a random class of the case, the others lie anywhere. Patches
    stay inside the image; where the image is smaller, it lies inside the patch, and
    the rest is 0 and background.
    """

    def __init__(
        self,
        cache: CaseSource,
        case_ids: Sequence[str],
        patch_size: Size3,
        batch_size: int,
        scheme: LabelScheme,
        *,
        oversample_foreground: float = 0.33,
        seed: int = 12345,
        margin: AugmentationConfig | Size3 | None = None,
    ) -> None:
        """Prepare a sampler; nothing is read yet.

        Args:
            cache: Where cases are loaded from.
            case_ids: Cases to sample, by id; at least one.
            patch_size: Voxels of a patch along D, H, W.
            batch_size: Patches in a batch, at least 1.
            scheme: The labels' meaning.
            oversample_foreground: Share of the patches sure to hold foreground, 0..1.
                As in nnU-Net it is rounded to whole patches of a batch; where that
                gives none, each patch is chosen with this probability.
            seed: Batches are a function of this and the step.
            margin: What lies around the patches. The augmentation's configuration:
                rotations and zooms are drawn here, and just what those need is read
                (`Batch.spatial`, which `augment` applies). Three numbers: so many
                voxels more on both sides of D, H, W. None: bare patches.

        Raises:
            ConfigError: An argument is out of range.
        """
        _check(case_ids, patch_size, batch_size, oversample_foreground)
        self.case_ids = tuple(case_ids)
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.scheme = scheme
        self.oversample_foreground = oversample_foreground
        self.seed = seed
        self.margin = margin
        self._load = functools.lru_cache(maxsize=_OPEN_CASES)(cache.load)

    def batch(self, step: int, *, pin_memory: bool = False) -> Batch:
        """Read the batch of a step; safe to call from several threads.

        Args:
            step: Number of the batch, from 0.
            pin_memory: Read into page-locked memory, for fast copies to a GPU.

        Returns:
            image (B, C, *size) of the cache's type (mostly float16, which is half to
            read and to copy) and label (B, *size) int16 on the CPU. The size is the
            patch's where `margin` is None.
        """
        random = generator(self.seed, step)
        forced = self._forced(random)
        spatial = self._draw_spatial(step)
        regions, centers, names = [], [], []
        for index in range(self.batch_size):
            names.append(self.case_ids[random.integers(len(self.case_ids))])
            case = self._load(names[-1])
            start = self._choose_start(case, bool(forced[index]), random)
            lower, upper = self._region(case, start, spatial, index)
            regions.append((case, lower, upper))
            centers.append(start + (np.asarray(self.patch_size) - 1) / 2 - lower)
        image, label = _read(regions, pin_memory)
        if spatial is not None:
            spatial = SpatialDraw(spatial.matrices, spatial.active, np.stack(centers))
        return Batch(image, label, spatial, tuple(names))

    def _forced(self, random: np.random.Generator) -> Array:
        share, size = self.oversample_foreground, self.batch_size
        luck = random.random(size) < share
        free = round(size * (1 - share))
        return luck if free == size else np.arange(size) >= free

    def _draw_spatial(self, step: int) -> SpatialDraw | None:
        if not isinstance(self.margin, AugmentationConfig):
            return None
        seed = int(generator(self.seed, step, 1).integers(2**62))
        return draw_spatial(self.margin, self.batch_size, self.patch_size, seed)

    def _choose_start(
        self, case: CaseArrays, forced: bool, random: np.random.Generator
    ) -> Array:
        """Choose a patch's first voxel, inside the image where that is possible."""
        room = np.asarray(case.label.shape) - np.asarray(self.patch_size)
        lowest, highest = np.minimum(room, 0), np.maximum(room, 0)
        voxel = self._foreground_voxel(case, random) if forced else None
        if voxel is None and self.scheme.ignore_label is not None:
            voxel = self._annotated_voxel(case, random)
        if voxel is None:
            return random.integers(lowest, highest + 1)
        centered = np.asarray(voxel) - np.asarray(self.patch_size) // 2
        return np.clip(centered, lowest, highest)

    def _foreground_voxel(
        self, case: CaseArrays, random: np.random.Generator
    ) -> Array | None:
        skipped = (0, self.scheme.ignore_label)
        found = [
            places
            for value, places in sorted(case.foreground.items())
            if value not in skipped and len(places)
        ]
        if not found:
            return None
        places = found[random.integers(len(found))]
        return np.asarray(places[random.integers(len(places))], int)

    def _annotated_voxel(
        self, case: CaseArrays, random: np.random.Generator
    ) -> Array | None:
        voxels = random.integers(0, case.label.shape, (_TRIES, 3))
        for voxel in voxels:
            if case.label[tuple(voxel)] != self.scheme.ignore_label:
                return voxel
        return None

    def _region(
        self, case: CaseArrays, start: Array, spatial: SpatialDraw | None, index: int
    ) -> tuple[Array, Array]:
        """Give the box to read: what a rotation or zoom needs, else the patch."""
        size = np.asarray(self.patch_size)
        if spatial is not None and spatial.active[index]:
            middle = start + (size - 1) / 2
            reach = np.abs(spatial.matrices[index]) @ ((size - 1) / 2)
            lower = np.floor(middle - reach).astype(int)
            upper = np.ceil(middle + reach).astype(int) + 1
            shape = np.asarray(case.label.shape)
            lower, upper = np.clip(lower, 0, shape), np.clip(upper, 0, shape)
            return lower, np.maximum(upper, lower)
        extra = np.zeros(3, int)
        if isinstance(self.margin, tuple):
            extra = np.asarray(self.margin)
        return start - extra, start + size + extra


def _read(
    regions: list[tuple[CaseArrays, Array, Array]], pin_memory: bool
) -> tuple[Tensor, Tensor]:
    sizes = [upper - lower for _, lower, upper in regions]
    size = tuple(np.maximum(np.max(sizes, axis=0), 1).tolist())
    kind = np.result_type(*[case.image.dtype for case, _, _ in regions])
    dtype = torch.from_numpy(np.empty(0, kind)).dtype
    channels = regions[0][0].image.shape[0]
    shape = (len(regions), channels, *size)
    image = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    label = torch.empty((len(regions), *size), dtype=torch.int16, pin_memory=pin_memory)
    for (case, lower, upper), i, k in zip(
        regions, image.numpy(), label.numpy(), strict=True
    ):
        _read_box(case.image, lower, upper, i)
        _read_box(case.label, lower, upper, k)
    return image, label


def _read_box(source: Array, lower: Array, upper: Array, target: Array) -> None:
    """Copy a box (..., D, H, W) to the front of the target; zeros beyond the source."""
    begin, end = np.maximum(lower, 0), np.minimum(upper, source.shape[-3:])
    if np.any(end - begin < target.shape[-3:]):
        target[...] = 0
    if np.any(end <= begin):
        return
    there = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
    here = tuple(slice(a, b) for a, b in zip(begin - lower, end - lower, strict=True))
    target[(..., *here)] = source[(..., *there)]


def _check(
    case_ids: Sequence[str], patch_size: Size3, batch_size: int, share: float
) -> None:
    if not case_ids:
        raise ConfigError(
            describe("no case to train on", expected="at least one", found="none")
        )
    if batch_size < 1 or min(patch_size) < 1:
        raise ConfigError(
            describe(
                "bad patch or batch size",
                expected="positive numbers",
                found=f"patch {patch_size}, batch {batch_size}",
            )
        )
    if not 0 <= share <= 1:
        raise ConfigError(
            describe("bad oversample_foreground", expected="0 to 1", found=share)
        )
