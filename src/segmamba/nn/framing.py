"""What stands around every network: images of any size in, logits of that size out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import GeometryError, describe
from segmamba.types import Size3


def image_size(image: Tensor, channels: int) -> Size3:
    """Give the size of a batch of volumes, once it is one.

    Args:
        image: (B, channels, D, H, W).
        channels: Channels that the network takes.

    Returns:
        (D, H, W).

    Raises:
        GeometryError: The image has the wrong number of axes or channels.
    """
    if image.dim() != 5 or image.shape[1] != channels:
        raise GeometryError(
            describe(
                "a network takes a batch of volumes",
                expected=f"(B, {channels}, D, H, W)",
                found=tuple(image.shape),
            )
        )
    return (image.shape[2], image.shape[3], image.shape[4])


def padded_size(size: Size3, strides: list[Size3]) -> Size3:
    """Give the size that an image is padded to.

    Args:
        size: (D, H, W) of the image in voxels.
        strides: Stride of each level.

    Returns:
        The next multiples of the total strides; twice those on each down-sampled axis
        where the deepest level would have a single voxel, which has no variance.
    """
    totals = [1, 1, 1]
    for stride in strides:
        totals = [total * step for total, step in zip(totals, stride, strict=True)]
    counts = [-(-side // total) for side, total in zip(size, totals, strict=True)]
    if math.prod(counts) == 1:
        counts = [2 if total > 1 else 1 for total in totals]
        counts = counts if max(counts) > 1 else [2, 2, 2]
    padded = [count * total for count, total in zip(counts, totals, strict=True)]
    return (padded[0], padded[1], padded[2])


def pad_to_size(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Pad the end of each axis with zeros.

    Args:
        x: Image, (B, C, D, H, W).
        sides: Wanted (D, H, W), none smaller than the image's.

    Returns:
        The image, (B, C, *sides); itself if nothing is missing.
    """
    missing = [side - now for side, now in zip(sides, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    depth, height, width = missing
    return F.pad(x, (0, width, 0, height, 0, depth))


def crop(x: Tensor, size: Size3) -> Tensor:
    """Keep the first (D, H, W) = `size` voxels of (B, C, D', H', W')."""
    if tuple(x.shape[2:]) == size:
        return x
    depth, height, width = size
    return x[:, :, :depth, :height, :width]


def crop_levels(
    outputs: Sequence[Tensor], size: Size3, strides: Sequence[Size3]
) -> list[Tensor]:
    """Crop logits of each resolution to what the image covers there.

    Args:
        outputs: Logits, full resolution first.
        size: (D, H, W) of the image.
        strides: From each resolution to the next.

    Returns:
        Logits of ceil(side / stride) voxels.
    """
    cropped = [crop(outputs[0], size)]
    for output, stride in zip(outputs[1:], strides, strict=False):
        depth, height, width = (
            -(-side // step) for side, step in zip(size, stride, strict=True)
        )
        size = (depth, height, width)
        cropped.append(crop(output, size))
    return cropped
