"""Random changes of training patches: nnU-Net's stock set, for batches of tensors.

`segmamba.data.draws` draws the parameters, `apply` is a pure function of a batch and
those numbers, `augment` does both. Each change is computed for all samples that have it
at once: the CPU launches as few operations for many small patches as for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from segmamba.config import AugmentationConfig
from segmamba.data import transforms
from segmamba.data.draws import (
    AugmentationDraw,
    IntensityDraw,
    Seeds,
    SpatialDraw,
    draw_intensity,
    draw_spatial,
)
from segmamba.types import Array, Size3

AT_ONCE = 2**23
"""Numbers of an image that are worked on at once, or one volume: it bounds memory."""


@dataclass(frozen=True)
class Wide:
    """Samples to be turned or zoomed, with as much of the image as that needs."""

    rows: Array
    """(n,) the samples' places in their batch."""
    image: Tensor
    """(n, C, D, H, W), larger than a patch or not."""
    label: Tensor
    """(n, D, H, W)."""
    matrices: Array
    """(n, 3, 3), from offsets in the patch to offsets in the image, in voxels."""
    centers: Array
    """(n, 3), where in the image the patch's middle lies, in voxels."""


@dataclass(frozen=True)
class Batch:
    """Training patches, as the sampler gives and `augment` changes them."""

    image: Tensor
    """(B, C, D, H, W): float32, or float16 as the sampler reads it from the cache."""
    label: Tensor
    """(B, D, H, W) int16, the data set's own integers."""
    wide: tuple[Wide, ...] | None = None
    """Rotations and zooms that were drawn while reading; their samples are still to be
    filled in. None where none were drawn."""
    case_ids: tuple[str, ...] = ()
    """The case of each sample, for messages; may be empty."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Copy the tensors to a device."""
        return self._changed(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy the tensors to page-locked memory, for faster copies to a GPU."""
        return self._changed(lambda part: part.pin_memory())

    def split(self, size: int) -> list[Batch]:
        """Give batches of so many samples, which share this one's memory."""
        images, labels = self.image.split(size), self.label.split(size)
        names = [self.case_ids[i : i + size] for i in range(0, len(self.image), size)]
        return [
            Batch(image, label, case_ids=ids)
            for image, label, ids in zip(images, labels, names, strict=True)
        ]

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        wide = self.wide and tuple(
            replace(part, image=change(part.image), label=change(part.label))
            for part in self.wide
        )
        return Batch(change(self.image), change(self.label), wide, self.case_ids)


def augment(
    batch: Batch, patch_size: Size3, config: AugmentationConfig, generator_seed: Seeds
) -> Batch:
    """Change a batch at random, on the batch's device.

    Args:
        batch: Patches; where the sampler has drawn rotations and zooms already
            (`Batch.wide`), those are applied, else they are drawn here.
        patch_size: Voxels of the patches to give back along D, H, W.
        config: What to do how often; `enabled=False` only cuts the patches out.
        generator_seed: The result is a function of the batch and this. Several seeds
            treat the batch as so many batches of one size, one after the other.

    Returns:
        A new batch of shape (B, C, *patch_size), float32, and (B, *patch_size); the
        given one is left as it was.
    """
    count, channels = batch.image.shape[:2]
    if not isinstance(generator_seed, int):
        count //= len(generator_seed)
    if batch.wide is None:
        spatial = draw_spatial(config, count, patch_size, generator_seed)
        batch = _widen(batch, patch_size, spatial)
    intensity = draw_intensity(config, count, channels, patch_size, generator_seed)
    return _change(batch, intensity)


def apply(batch: Batch, patch_size: Size3, drawn: AugmentationDraw) -> Batch:
    """Apply drawn parameters, in nnU-Net's order.

    Args:
        batch: Patches, possibly with more around them; left as they are.
        patch_size: Voxels to give back along D, H, W.
        drawn: What to do to each sample and channel.

    Returns:
        A new batch of shape (B, C, *patch_size) and (B, *patch_size).
    """
    return _change(_widen(batch, patch_size, drawn.spatial), drawn.intensity)


def _widen(batch: Batch, patch_size: Size3, drawn: SpatialDraw) -> Batch:
    """Cut the patches out of the middle; keep all of those that are to be turned."""
    shape, size = batch.label.shape[1:], patch_size
    # A tensor larger than the patch by an odd number has its middle between voxels.
    first = [(a - b) // 2 for a, b in zip(shape, size, strict=True)]
    start = (first[0], first[1], first[2])
    image, label = (
        transforms.crop(part, start, size) for part in (batch.image, batch.label)
    )
    center = np.asarray(start) + (np.asarray(size) - 1) / 2
    wide = []
    for rows in _few(np.flatnonzero(drawn.active), batch.image[0].numel()):
        place = transforms.send(rows, image.device)
        images = batch.image.index_select(0, place)
        labels = batch.label.index_select(0, place)
        centers = np.tile(center, (len(rows), 1))
        wide.append(Wide(rows, images, labels, drawn.matrices[rows], centers))
    return Batch(image, label, tuple(wide), batch.case_ids)


@torch.no_grad()
def _change(batch: Batch, drawn: IntensityDraw) -> Batch:
    dtype = torch.promote_types(batch.image.dtype, torch.float32)
    layout = torch.contiguous_format
    image = batch.image.to(dtype, copy=True, memory_format=layout)
    label = batch.label.clone(memory_format=layout)
    for part in batch.wide or ():
        _fill_in(part, image, label)
    _add_noise(image, drawn)
    _change_intensities(image.flatten(0, 1), drawn)
    _mirror(image, label, drawn.mirror)
    return Batch(image, label, case_ids=batch.case_ids)


def _fill_in(part: Wide, image: Tensor, label: Tensor) -> None:
    """Turn and zoom samples, and put them into their places."""
    shape, size = part.label.shape[1:], label.shape[1:]
    size, shape = (size[0], size[1], size[2]), (shape[0], shape[1], shape[2])
    places = (part.matrices, part.centers)
    grid = transforms.affine_grid(*places, size, shape, image.device)
    rows = transforms.send(part.rows, image.device)
    image.index_copy_(0, rows, transforms.sample(part.image.to(image.dtype), grid))
    label.index_copy_(0, rows, transforms.sample_labels(part.label, grid))


def _add_noise(image: Tensor, drawn: IntensityDraw) -> None:
    source = torch.Generator(image.device)

    def add(samples: Tensor, rows: Array) -> Tensor:
        fields = torch.empty_like(samples[:, :1])
        for field, row in zip(fields, rows, strict=True):
            source.manual_seed(int(drawn.noise_seed[row]))
            field.normal_(0, float(drawn.noise_deviation[row]), generator=source)
        return samples + fields

    _change_rows(image, _drawn(drawn.noise_deviation), add)


def _change_intensities(volumes: Tensor, drawn: IntensityDraw) -> None:
    """Change the channels of all samples (B C, D, H, W) in place."""
    steps = (
        (drawn.blur_sigma, transforms.gaussian_blur),
        (drawn.brightness, transforms.brightness),
        (drawn.contrast, transforms.contrast),
        (drawn.low_resolution, transforms.low_resolution),
        (drawn.gamma_inverted, partial(transforms.gamma, inverted=True)),
        (drawn.gamma, transforms.gamma),
    )
    for parameters, change in steps:
        _change_drawn(volumes, parameters, change)


def _change_drawn(
    volumes: Tensor, parameters: Array, change: Callable[[Tensor, Array], Tensor]
) -> None:
    """Change the volumes that have parameters (B, C, ...) other than NaN."""
    values = parameters.reshape(len(volumes), *parameters.shape[2:])
    _change_rows(volumes, _drawn(values), lambda part, rows: change(part, values[rows]))


def _mirror(image: Tensor, label: Tensor, mirror: Array) -> None:
    codes = mirror @ np.array([1, 2, 4])
    for code in range(1, 8):
        rows = np.flatnonzero(codes == code)
        axes = [axis - 3 for axis in range(3) if code >> axis & 1]
        for tensor in (image, label):
            _change_rows(tensor, rows, lambda part, _, axes=axes: part.flip(axes))


def _drawn(values: Array) -> Array:
    """Give the rows that hold numbers."""
    return np.flatnonzero(np.isfinite(values).reshape(len(values), -1).all(1))


def _change_rows(
    tensor: Tensor, rows: Array, change: Callable[[Tensor, Array], Tensor]
) -> None:
    """Replace some rows of a tensor, a few at a time."""
    for some in _few(rows, tensor[0].numel()):
        place = transforms.send(some, tensor.device)
        tensor.index_copy_(0, place, change(tensor.index_select(0, place), some))


def _few(rows: Array, numbers: int) -> Iterator[Array]:
    count = max(AT_ONCE // max(numbers, 1), 1)
    for first in range(0, len(rows), count):
        yield rows[first : first + count]
