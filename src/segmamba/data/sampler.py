"""Training patches out of the cache: a pure function of a seed and a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from segmamba.config import AugmentationConfig
from segmamba.data.augment import AT_ONCE, Batch, Wide
from segmamba.data.cases import CaseSource, OpenCase, OpenCases
from segmamba.data.draws import SpatialDraw, draw_spatial, generator, step_seed
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, describe
from segmamba.types import Array, Size3

_TRIES = 32
"""Voxels looked at in search of an annotated one."""

Start = list[int]
"""A patch's first voxel along D, H, W."""


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
        margin: AugmentationConfig | None = None,
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
            margin: The augmentation, if there will be one: rotations and zooms are
                drawn here, and just what those need around the patches is read
                (`Batch.wide`, which `augment` applies). None: bare patches.

        Raises:
            ConfigError: An argument is out of range.
        """
        _check(case_ids, patch_size, batch_size, oversample_foreground)
        self.case_ids = tuple(case_ids)
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.oversample_foreground = oversample_foreground
        self.seed = seed
        self.margin = margin
        self._ignored = scheme.ignore_label
        self._open = OpenCases(cache, scheme)

    @property
    def channels(self) -> int:
        """Channels of the images; a case is opened to see."""
        return self._open(self.case_ids[0]).image.shape[0]

    def batch(self, step: int, *, pin_memory: bool = False) -> Batch:
        """Read the batch of a step; safe to call from several threads.

        Args:
            step: Number of the batch, from 0.
            pin_memory: Read into page-locked memory, for fast copies to a GPU.

        Returns:
            image (B, C, *patch) of the cache's type (mostly float16, which is half to
            read and to copy) and label (B, *patch) int16 on the CPU. Samples that are
            to be turned or zoomed are 0; what these need is in `Batch.wide`.
        """
        return self.batches([step], pin_memory=pin_memory)

    def batches(self, steps: Sequence[int], *, pin_memory: bool = False) -> Batch:
        """Read the batches of several steps, one after the other, as one."""
        patches = [patch for step in steps for patch in self._choose(step)]
        cases = [case for case, _ in patches]
        image, label = _allocate(cases, self.patch_size, pin_memory)
        spatial = self._draw_spatial(steps)
        turned = [False] * len(patches)
        if spatial is not None:
            turned = spatial.active.tolist()
        rows = zip(patches, turned, image.numpy(), label.numpy(), strict=True)
        for (case, start), is_turned, i, k in rows:
            if is_turned:
                i[...], k[...] = 0, 0
            else:
                stop = [a + n for a, n in zip(start, self.patch_size, strict=True)]
                _read(case, start, stop, i, k)
        wide = None
        if spatial is not None:
            wide = tuple(self._read_wide(patches, spatial, pin_memory))
        return Batch(image, label, wide, tuple(case.id for case in cases))

    def _choose(self, step: int) -> Iterator[tuple[OpenCase, Start]]:
        """Choose the case and the first voxel of each patch of a step."""
        random = generator(self.seed, step)
        free = round(self.batch_size * (1 - self.oversample_foreground))
        for row, luck in enumerate(random.random((self.batch_size, 7)).tolist()):
            forced = row >= free
            if free == self.batch_size:
                forced = luck[0] < self.oversample_foreground
            case = self._open(self.case_ids[int(luck[1] * len(self.case_ids))])
            voxel = _foreground_voxel(case, luck[2], luck[3]) if forced else None
            if voxel is None and self._ignored is not None:
                voxel = self._annotated_voxel(case, random)
            yield case, self._start(case, voxel, luck[4:])

    def _start(self, case: OpenCase, voxel: Start | None, luck: list[float]) -> Start:
        """Give a patch's first voxel, inside the image where that is possible."""
        room = [a - n for a, n in zip(case.shape, self.patch_size, strict=True)]
        if voxel is None:
            return [
                min(n, 0) + int(share * (abs(n) + 1))
                for n, share in zip(room, luck, strict=True)
            ]
        return [
            min(max(middle - size // 2, min(n, 0)), max(n, 0))
            for middle, size, n in zip(voxel, self.patch_size, room, strict=True)
        ]

    def _annotated_voxel(
        self, case: OpenCase, random: np.random.Generator
    ) -> Start | None:
        for voxel in random.integers(0, case.shape, (_TRIES, 3)).tolist():
            if case.label[tuple(voxel)] != self._ignored:
                return voxel
        return None

    def _draw_spatial(self, steps: Sequence[int]) -> SpatialDraw | None:
        if self.margin is None:
            return None
        seeds = [step_seed(self.seed, step) for step in steps]
        return draw_spatial(self.margin, self.batch_size, self.patch_size, seeds)

    def _read_wide(
        self,
        patches: list[tuple[OpenCase, Start]],
        spatial: SpatialDraw,
        pin_memory: bool,
    ) -> Iterator[Wide]:
        """Read the boxes that the rotations and zooms need, some in each tensor."""
        rows = np.flatnonzero(spatial.active)
        if not len(rows):
            return
        cases, starts = zip(*[patches[row] for row in rows], strict=True)
        matrices = spatial.matrices[rows]
        half = (np.asarray(self.patch_size) - 1) / 2
        middles, reach = np.asarray(starts) + half, np.abs(matrices) @ half
        shapes = np.asarray([case.shape for case in cases])
        lower = np.clip(np.floor(middles - reach).astype(int), 0, shapes)
        upper = np.clip(np.ceil(middles + reach).astype(int) + 1, lower, shapes)
        sizes = np.maximum(upper - lower, 1)
        for some in _groups(sizes, cases[0].image.shape[0]):
            depth, height, width = sizes[some].max(0).tolist()
            image, label = _allocate(cases[some], (depth, height, width), pin_memory)
            edges = lower[some].tolist(), upper[some].tolist()
            boxes = zip(cases[some], *edges, image.numpy(), label.numpy(), strict=True)
            for box in boxes:
                _read(*box)
            centers = middles[some] - lower[some]
            yield Wide(rows[some], image, label, matrices[some], centers)


def _foreground_voxel(case: OpenCase, luck: float, more: float) -> Start | None:
    if not case.places:
        return None
    places = case.places[int(luck * len(case.places))]
    return places[int(more * len(places))].tolist()


def _groups(sizes: Array, channels: int) -> Iterator[slice]:
    """Divide boxes, in order, so that the padded boxes of a group stay small."""
    first, largest = 0, sizes[0]
    for index in range(1, len(sizes)):
        larger = np.maximum(largest, sizes[index])
        if (index + 1 - first) * channels * math.prod(larger.tolist()) > AT_ONCE:
            yield slice(first, index)
            first, larger = index, sizes[index]
        largest = larger
    yield slice(first, len(sizes))


def _allocate(
    cases: Sequence[OpenCase], size: Size3, pin_memory: bool
) -> tuple[Tensor, Tensor]:
    kind = np.result_type(*{case.image.dtype for case in cases})
    dtype = torch.from_numpy(np.empty(0, kind)).dtype
    shape = (len(cases), cases[0].image.shape[0], *size)
    image = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    shape = (len(cases), *size)
    return image, torch.empty(shape, dtype=torch.int16, pin_memory=pin_memory)


def _read(
    case: OpenCase, lower: list[int], upper: list[int], image: Array, label: Array
) -> None:
    """Copy a box to the front of the arrays; zeros beyond the image."""
    there, here, whole = [], [], True
    for a, b, n, m in zip(lower, upper, case.shape, image.shape[-3:], strict=True):
        begin, end = max(a, 0), max(min(b, n), 0)
        whole &= end - begin == m
        there.append(slice(begin, end))
        here.append(slice(begin - a, end - a))
    if not whole:
        image[...], label[...] = 0, 0
    image[(..., *here)] = case.image[(..., *there)]
    label[tuple(here)] = case.label[tuple(there)]


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
