"""Pure changes of one image or label map as tensors (…, D, H, W) on any device.

Nothing is drawn at random here; `segmamba.data.augment` draws the parameters.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmamba.types import Array, Size3

BLUR_TRUNCATE = 3.0
"""Standard deviations after which a Gaussian kernel is cut off."""

_LABELS_AT_ONCE = 4
"""Labels whose scores are held at the same time while labels are resampled."""


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


def sample_affine(image: Tensor, matrix: Array, center: Array, size: Size3) -> Tensor:
    """Resample an image under a linear map, trilinearly, zero outside.

    Args:
        image: (C, D, H, W), floating point.
        matrix: (3, 3). Output voxel o shows the input at
            center + matrix (o - (size - 1) / 2), all in voxels along D, H, W.
        center: (3,), input position in the middle of the output, in voxels.
        size: Voxels of the output along D, H, W.

    Returns:
        (C, *size), the input's dtype.
    """
    matrix, center = np.asarray(matrix, np.float64), np.asarray(center, np.float64)
    first = center - matrix @ ((np.asarray(size) - 1) / 2)
    if _leaves_first_axis_alone(matrix, first):
        return _sample_in_plane(image, matrix, first, size)
    grid = _grid(matrix, first, size, tuple(image.shape[-3:]), image.device)
    grid = grid.to(image.dtype)
    if image.device.type != "cpu":
        return F.grid_sample(image[None], grid[None], align_corners=False)[0]
    # The CPU kernel shares work by batch entry: make each slab of the output one.
    slabs = image.expand(size[0], *image.shape)
    out = F.grid_sample(slabs, grid[:, None], align_corners=False)
    return out[:, :, 0].transpose(0, 1)


def sample_affine_labels(
    label: Tensor, matrix: Array, center: Array, size: Size3
) -> Tensor:
    """Resample a label map: each voxel takes the label with the largest linear share.

    The shares are those of one-hot maps resampled as images, so borders stay smooth
    and no value is invented. Ties go to background, then to the smallest value.

    Args:
        label: (D, H, W) integers; outside of the map is background, 0.
        matrix: As for `sample_affine`.
        center: As for `sample_affine`.
        size: Voxels of the output.

    Returns:
        (*size) integers of the input's dtype.
    """
    out = label.new_zeros(size)
    box = _foreground_box(label)
    if box is None:
        return out
    lower, upper = box
    matrix = np.asarray(matrix, np.float64)
    middle = np.asarray(center, np.float64)
    start, stop = _reached_box(lower, upper, matrix, middle, size)
    part = (stop[0] - start[0], stop[1] - start[1], stop[2] - start[2])
    if min(part) <= 0:
        return out
    shift = (np.asarray(start) + np.asarray(stop) - np.asarray(size)) / 2
    cut = label[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))]
    inner = middle + matrix @ shift - np.asarray(lower)
    region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    out[region] = _vote(cut, matrix, inner, part)
    return out


def gaussian_blur(volume: Tensor, sigma: Array) -> Tensor:
    """Smooth with a separable Gaussian, mirrored (without the edge) at the border.

    Args:
        volume: (..., D, H, W), floating point.
        sigma: (3,) standard deviations along D, H, W in voxels; 0 for none.

    Returns:
        Smoothed tensor of the same shape.
    """
    for axis, width in zip((-3, -2, -1), sigma, strict=True):
        radius = min(int(BLUR_TRUNCATE * width + 0.5), volume.shape[axis] - 1)
        if radius > 0:
            volume = _blur_axis(volume, axis, float(width), radius)
    return volume


def low_resolution(volume: Tensor, scale: Array) -> Tensor:
    """Take voxels away (nearest neighbour) and interpolate back (linear).

    Args:
        volume: (D, H, W), floating point.
        scale: (3,) share of the voxels to keep along D, H, W, in (0, 1].

    Returns:
        (D, H, W).
    """
    shape = tuple(volume.shape)
    small = tuple(
        max(round(n * float(s)), 1) for n, s in zip(shape, scale, strict=True)
    )
    if small == shape:
        return volume
    reduced = F.interpolate(volume[None, None], size=small, mode="nearest-exact")
    return F.interpolate(reduced, size=shape, mode="trilinear")[0, 0]


def contrast(volume: Tensor, factor: float) -> Tensor:
    """Spread values about their mean, kept inside their former range.

    Args:
        volume: Floating-point tensor of any shape, taken as one population.
        factor: Multiplier of the distance from the mean, above 0.

    Returns:
        Tensor of the same shape.
    """
    lowest, highest = torch.aminmax(volume)
    mean = volume.mean()
    return ((volume - mean).mul_(factor).add_(mean)).clamp_(lowest, highest)


def gamma(volume: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """Raise values, scaled to 0..1 by their range, to a power; keep mean and deviation.

    Args:
        volume: Floating-point tensor of any shape, taken as one population.
        exponent: The power, above 0.
        inverted: Work on the negative image.

    Returns:
        Tensor of the same shape.
    """
    values = -volume if inverted else volume
    lowest, highest = torch.aminmax(values)
    extent = highest - lowest
    mean, deviation = values.mean(), values.std(correction=0)
    curved = (values - lowest).div_(extent.clamp(min=1e-7)).pow_(exponent).mul_(extent)
    spread = deviation / curved.std(correction=0).clamp(min=1e-7)
    curved = (curved - curved.mean()).mul_(spread).add_(mean)
    return curved.neg_() if inverted else curved


def _leaves_first_axis_alone(matrix: Array, first: Array) -> bool:
    cross = np.concatenate([matrix[0, 1:], matrix[1:, 0]])
    whole = first[0] == round(float(first[0]))
    return bool(matrix[0, 0] == 1 and not cross.any() and whole)


def _sample_in_plane(image: Tensor, matrix: Array, first: Array, size: Size3) -> Tensor:
    height, width = image.shape[-2:]
    slices = crop(image, (round(first[0]), 0, 0), (size[0], height, width))
    grid = _grid(matrix, first, size, (1, height, width), image.device)[:1, ..., :2]
    flat = slices.reshape(1, -1, height, width)
    out = F.grid_sample(flat, grid.to(image.dtype), align_corners=False)
    return out.reshape(image.shape[0], *size)


def _grid(
    matrix: Array,
    first: Array,
    size: Size3,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Give grid_sample's positions (*size, 3), ordered W, H, D, in -1..1."""
    extent = np.asarray(shape, np.float64)
    columns = (2 * matrix / extent[:, None])[::-1]  # rows to W, H, D
    origin = ((2 * first + 1) / extent - 1)[::-1]
    axes = []
    for axis, length in enumerate(size):
        line = np.arange(length)[:, None] * columns[:, axis]
        form = [1, 1, 1, 3]
        form[axis] = length
        axes.append(line.reshape(form))
    plane = torch.from_numpy(axes[1] + axes[2]).to(device, torch.float32)
    lines = torch.from_numpy(axes[0] + origin).to(device, torch.float32)
    return lines + plane


def _foreground_box(label: Tensor) -> tuple[list[int], list[int]] | None:
    present = label != 0
    columns = present.any(0)
    lines = torch.cat([present.flatten(1).any(1), columns.any(1), columns.any(0)])
    # One copy to the CPU: each makes a GPU's thread wait.
    found = np.split(lines.cpu().numpy(), np.cumsum(label.shape)[:2])
    spans = [np.flatnonzero(line) for line in found]
    if len(spans[0]) == 0:
        return None
    return [int(span[0]) for span in spans], [int(span[-1]) + 1 for span in spans]


def _reached_box(
    lower: list[int], upper: list[int], matrix: Array, center: Array, size: Size3
) -> tuple[list[int], list[int]]:
    """Give the output box outside of which the input box has no influence."""
    corners = itertools.product(*zip(lower, upper, strict=True))
    # Linear interpolation reaches less than one voxel beyond the box.
    outward = np.array(list(corners), np.float64)
    outward += np.where(outward == np.asarray(upper), 0, -1)
    middle = (np.asarray(size) - 1) / 2
    reached = (outward - center) @ np.linalg.inv(matrix).T + middle
    start = np.clip(np.floor(reached.min(0)), 0, size).astype(int)
    stop = np.clip(np.ceil(reached.max(0)) + 1, 0, size).astype(int)
    return start.tolist(), stop.tolist()


def _vote(label: Tensor, matrix: Array, center: Array, size: Size3) -> Tensor:
    values = [value for value in _values(label) if value != 0]
    best = torch.zeros(size, device=label.device)
    total = torch.zeros(size, device=label.device)
    winner = torch.zeros(size, dtype=label.dtype, device=label.device)
    for first in range(0, len(values), _LABELS_AT_ONCE):
        group = values[first : first + _LABELS_AT_ONCE]
        hot = torch.stack([label == value for value in group]).float()
        for value, score in zip(
            group, sample_affine(hot, matrix, center, size), strict=True
        ):
            total += score
            better = score > best
            best = torch.where(better, score, best)
            winner.masked_fill_(better, value)
    # Background and what lies outside have the rest of the shares.
    return winner.masked_fill_(1 - total >= best, 0)


def _values(label: Tensor) -> list[int]:
    lowest = int(label.min())
    counts = torch.bincount(label.flatten().int() - lowest)
    return (np.flatnonzero(counts.cpu().numpy()) + lowest).tolist()


def _blur_axis(volume: Tensor, axis: int, sigma: float, radius: int) -> Tensor:
    offsets = np.arange(radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights[0] + 2 * weights[1:].sum()
    length = volume.shape[axis]
    before = volume.narrow(axis, 1, radius).flip(axis)
    after = volume.narrow(axis, length - 1 - radius, radius).flip(axis)
    wide = torch.cat([before, volume, after], axis)
    out = volume * float(weights[0])
    # Adding shifted copies beats a depth-wise convolution on CPUs by far.
    for offset in range(1, radius + 1):
        weight = float(weights[offset])
        out.add_(wide.narrow(axis, radius - offset, length), alpha=weight)
        out.add_(wide.narrow(axis, radius + offset, length), alpha=weight)
    return out
