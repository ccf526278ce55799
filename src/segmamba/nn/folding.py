"""A strided convolution of few channels, as one without stride of many channels.

GPUs multiply matrices, and an image's few channels leave most of a tile empty. Folding
each block of `stride` voxels into channels gives more of them, for the same sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def folded_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]
) -> Tensor:
    """Give F.conv3d(x, weight, bias, stride, padding=k // 2) for odd kernels.

    Along an axis, output o is the sum over k of weight[k] x[stride o + k - padding].
    With zeros in front of the kernel, stride divides the padding; k is then
    stride j + q, and q becomes a channel.

    Args:
        x: Image, (B, C, D, H, W).
        weight: Kernel, (O, C, kd, kh, kw), of odd sides.
        bias: (O,), or None.
        stride: Down-sampling along (D, H, W).

    Returns:
        Features, (B, O, ceil(D / stride), ...).
    """
    kernel = weight.shape[2:]
    front = [-(side // 2) % step for side, step in zip(kernel, stride, strict=True)]
    taps = [
        -(-(side + zeros) // step)
        for side, zeros, step in zip(kernel, front, stride, strict=True)
    ]
    before = [
        side // 2 + zeros for side, zeros in zip(kernel, front, strict=True)
    ]  # multiples of the stride
    outputs = [-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True)]
    lengths = [count + j - 1 for count, j in zip(outputs, taps, strict=True)]
    if torch.is_autocast_enabled(x.device.type):  # half as much to move
        x = x.to(torch.get_autocast_dtype(x.device.type))
    image = _fold(_padded(x, before, lengths, stride), stride)
    return F.conv3d(image, _fold(_padded(weight, front, taps, stride), stride), bias)


def _padded(
    x: Tensor, before: Sequence[int], blocks: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Pad the last three axes with zeros to a number of blocks; crop what is beyond."""
    ends = [
        (zeros, count * step - zeros - n)
        for zeros, count, step, n in zip(
            before, blocks, stride, x.shape[2:], strict=True
        )
    ]
    return F.pad(x, list(itertools.chain(*reversed(ends))))


def _fold(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Map (N, C, D, H, W) to channels-last (N, sd sh sw C, D / sd, H / sh, W / sw)."""
    count, channels, *size = x.shape
    (d, h, w), (sd, sh, sw) = size, stride
    blocks = x.permute(0, 2, 3, 4, 1).reshape(
        count, d // sd, sd, h // sh, sh, w // sw, sw, channels
    )
    rows = blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        count, d // sd, h // sh, w // sw, sd * sh * sw * channels
    )
    return rows.permute(0, 4, 1, 2, 3)
