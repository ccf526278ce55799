"""Pure changes of many images or label maps at once, as tensors on any device.

The first axis counts the images; each has parameters of its own. Nothing is drawn at
random here; `segmamba.data.augment` draws the parameters. No function looks at a number
on a GPU, except the one that asks which labels there are.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmamba.types import Array, Size3

BLUR_TRUNCATE = 3.0
"""Standard deviations after which a Gaussian kernel is cut off."""

_LABELS_AT_ONCE = 4
"""Labels whose scores are held at the same time while labels are resampled."""


def send(values: Array, device: torch.device) -> Tensor:
    """Put numbers on a device without making the CPU wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def crop(tensor: Tensor, start: Size3, size: Size3) -> Tensor:
    """Cut a box out, with zeros where the box leaves the tensor.

    Args:
        tensor: (..., D, H, W).
        start: First voxel of the box along D, H, W; may be negative.
        size: Voxels of the box.

    Returns:
        (..., *size); a view where no zeros were needed.
    """
    stop = tuple(first + length for first, length in zip(start, size, strict=True))
    shape = tensor.shape[-3:]
    inside = tuple(
        slice(min(max(a, 0), n), max(min(b, n), 0))
        for a, b, n in zip(start, stop, shape, strict=True)
    )
    cut = tensor[(..., *inside)]
    if tuple(cut.shape[-3:]) == tuple(size):
        return cut
    out = tensor.new_zeros((*tensor.shape[:-3], *size))
    target = tuple(
        slice(part.start - first, part.start - first + max(part.stop - part.start, 0))
        for part, first in zip(inside, start, strict=True)
    )
    if cut.numel():
        out[(..., *target)] = cut
    return out


def affine_grid(
    matrices: Array, centers: Array, size: Size3, shape: Size3, device: torch.device
) -> Tensor:
    """Give the positions at which `sample` reads images under linear maps.

    Args:
        matrices: (N, 3, 3). Output voxel o shows the input at
            center + matrix (o - (size - 1) / 2), all in voxels along D, H, W.
        centers: (N, 3), input positions in the middle of the outputs, in voxels.
        size: Voxels of the outputs along D, H, W.
        shape: Voxels of the inputs.
        device: Where the images are.

    Returns:
        (N, *size, 3) float32, ordered W, H, D, from -1 to 1 inside of the input.
    """
    matrices, extent = np.asarray(matrices, np.float64), np.asarray(shape, np.float64)
    first = centers - matrices @ ((np.asarray(size) - 1) / 2)
    columns = (2 * matrices / extent[:, None])[:, ::-1]  # rows to W, H, D
    origin = ((2 * first + 1) / extent - 1)[:, ::-1]
    lines = [
        np.arange(length)[:, None] * columns[:, None, :, axis]
        for axis, length in enumerate(size)
    ]
    lines[0] = lines[0] + origin[:, None]
    sent = send(np.concatenate(lines, 1).astype(np.float32), device)
    depth, height, width = sent.split(size, 1)
    plane = height[:, :, None] + width[:, None]
    return depth[:, :, None, None] + plane[:, None]


def sample(images: Tensor, grid: Tensor) -> Tensor:
    """Read images at positions between voxels, trilinearly, zero outside.

    Args:
        images: (N, C, D, H, W), floating point.
        grid: (N, *size, 3) of `affine_grid`.

    Returns:
        (N, C, *size), the images' type.
    """
    grid = grid.to(images.dtype)
    if images.device.type != "cpu":
        return F.grid_sample(images, grid, align_corners=False)
    # The CPU kernel shares work by batch entry: make each slab of the output one.
    out = images.new_empty((*images.shape[:2], *grid.shape[1:4]))
    for image, positions, target in zip(images, grid, out, strict=True):
        slabs = image.expand(len(positions), *image.shape)
        read = F.grid_sample(slabs, positions[:, None], align_corners=False)
        target.copy_(read[:, :, 0].transpose(0, 1))
    return out


def sample_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """Read label maps: each voxel takes the label with the largest linear share.

    The shares are those of one-hot maps read as images, so borders stay smooth and no
    value is invented. Ties go to background, then to the smallest value.

    Args:
        labels: (N, D, H, W) integers; outside of the maps is background, 0.
        grid: (N, *size, 3) of `affine_grid`.

    Returns:
        (N, *size) integers of the input's type.
    """
    present = [value for value in _values(labels) if value != 0]
    best = torch.zeros(grid.shape[:-1], device=labels.device)
    total = torch.zeros_like(best)
    winner = labels.new_zeros(best.shape)
    for first in range(0, len(present), _LABELS_AT_ONCE):
        group = present[first : first + _LABELS_AT_ONCE]
        values = send(np.asarray(group), labels.device).to(labels.dtype)
        hot = labels[:, None] == values[:, None, None, None]
        scores = sample(hot.float(), grid)
        total += scores.sum(1)
        top, index = scores.max(1)  # the first of equal ones
        winner = torch.where(top > best, values[index], winner)
        best = torch.maximum(best, top)
    # Background and what lies outside have the rest of the shares.
    return winner.masked_fill_(1 - total >= best, 0)


def gaussian_blur(volumes: Tensor, sigma: Array) -> Tensor:
    """Smooth with separable Gaussians, mirrored (without the edge) at the border.

    Args:
        volumes: (N, D, H, W), floating point.
        sigma: (N, 3) standard deviations along D, H, W in voxels; 0 for none.

    Returns:
        Smoothed tensor of the same shape.
    """
    for axis in range(3):
        weights = _gaussian_weights(sigma[:, axis], volumes.shape[axis + 1])
        if weights.shape[1] > 1:
            volumes = _blur_axis(volumes, axis + 1, weights)
    return volumes


def low_resolution(volumes: Tensor, scale: Array) -> Tensor:
    """Take voxels away (nearest neighbour) and interpolate back (linear).

    Args:
        volumes: (N, D, H, W), floating point.
        scale: (N, 3) share of the voxels to keep along D, H, W, in (0, 1].

    Returns:
        Tensor of the same shape.
    """
    for axis in (1, 2, 3):
        length = volumes.shape[axis]
        kept = np.maximum(np.round(length * scale[:, axis - 1]), 1).astype(int)
        if (kept == length).all():
            continue
        lower, upper, weight = _coarse_neighbours(kept, length)
        shape = [len(volumes), 1, 1, 1]
        shape[axis] = length
        places = send(np.stack([lower, upper]), volumes.device).view(2, *shape)
        weights = send(weight, volumes.device).to(volumes.dtype).view(shape)
        below, above = places.expand(2, *volumes.shape)
        start, end = volumes.gather(axis, below), volumes.gather(axis, above)
        volumes = torch.lerp(start, end, weights)
    return volumes


def brightness(volumes: Tensor, factors: Array) -> Tensor:
    """Multiply values.

    Args:
        volumes: (N, D, H, W), floating point.
        factors: (N,) multipliers.

    Returns:
        Tensor of the same shape.
    """
    return (volumes.flatten(1) * _column(factors, volumes)).view_as(volumes)


def contrast(volumes: Tensor, factors: Array) -> Tensor:
    """Spread values about their mean, kept inside their former range.

    Args:
        volumes: (N, D, H, W), floating point; each is a population of its own.
        factors: (N,) multipliers of the distance from the mean, above 0.

    Returns:
        Tensor of the same shape.
    """
    flat = volumes.flatten(1)
    lowest, highest = torch.aminmax(flat, dim=1, keepdim=True)
    mean = flat.mean(1, keepdim=True)
    spread = (flat - mean).mul_(_column(factors, volumes)).add_(mean)
    return spread.clamp_(lowest, highest).view_as(volumes)


def gamma(volumes: Tensor, exponents: Array, *, inverted: bool = False) -> Tensor:
    """Raise values, scaled to 0..1 by their range, to a power; keep mean and deviation.

    Args:
        volumes: (N, D, H, W), floating point; each is a population of its own.
        exponents: (N,) powers, above 0.
        inverted: Work on the negative images.

    Returns:
        Tensor of the same shape.
    """
    values = -volumes.flatten(1) if inverted else volumes.flatten(1)
    lowest, highest = torch.aminmax(values, dim=1, keepdim=True)
    extent = highest - lowest
    mean, deviation = _centered(values)[1:]
    curved = (values - lowest).div_(extent.clamp(min=1e-7))
    curved = curved.pow_(_column(exponents, volumes)).mul_(extent)
    centered, _, new_deviation = _centered(curved)
    spread = deviation / new_deviation.clamp_(min=1e-7)
    curved = centered.mul_(spread).add_(mean)
    return (curved.neg_() if inverted else curved).view_as(volumes)


def _column(values: Array, like: Tensor) -> Tensor:
    return send(values, like.device).to(like.dtype)[:, None]


def _centered(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the rows less their mean, the means and the deviations."""
    mean = flat.mean(1, keepdim=True)
    centered = flat - mean
    # Several times faster than torch.std along an axis on a CPU.
    return centered, mean, centered.square().mean(1, keepdim=True).sqrt_()


def _values(labels: Tensor) -> list[int]:
    lowest = int(labels.min())
    counts = torch.bincount(labels.flatten().int() - lowest)
    return (np.flatnonzero(counts.cpu().numpy()) + lowest).tolist()


def _gaussian_weights(sigma: Array, length: int) -> Array:
    """Give the kernels' halves (N, 1 + largest radius), zeros behind their own."""
    radius = np.minimum((BLUR_TRUNCATE * sigma + 0.5).astype(int), length - 1)
    offsets = np.arange(radius.max() + 1)
    weights = np.exp(-0.5 * (offsets / np.maximum(sigma, 1e-6)[:, None]) ** 2)
    weights[offsets > radius[:, None]] = 0
    return weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True))


def _blur_axis(volumes: Tensor, axis: int, weights: Array) -> Tensor:
    radius, length = weights.shape[1] - 1, volumes.shape[axis]
    before = volumes.narrow(axis, 1, radius).flip(axis)
    after = volumes.narrow(axis, length - 1 - radius, radius).flip(axis)
    wide = torch.cat([before, volumes, after], axis)
    sent = send(weights, volumes.device).to(volumes.dtype)
    scales = sent[..., None, None, None].unbind(1)
    out = volumes * scales[0]
    # Adding shifted copies beats a depth-wise convolution on CPUs by far.
    for offset in range(1, radius + 1):
        lower = wide.narrow(axis, radius - offset, length)
        upper = wide.narrow(axis, radius + offset, length)
        out.addcmul_(lower + upper, scales[offset])
    return out


def _coarse_neighbours(kept: Array, length: int) -> tuple[Array, Array, Array]:
    """Say between which voxels each is interpolated once others are taken away.

    Args:
        kept: (N,) voxels that are left of a line.
        length: Voxels of the line before and after.

    Returns:
        The lower and the upper voxel (N, length) and the upper one's share.
    """
    kept = kept[:, None]
    position = (np.arange(length) + 0.5) * kept / length - 0.5
    position = np.maximum(position, 0)
    lower = np.floor(position).astype(int)
    upper = np.minimum(lower + 1, kept - 1)
    places = [
        np.floor((index + 0.5) * length / kept).astype(int) for index in (lower, upper)
    ]
    return places[0], places[1], position - lower
