"""What kernels take: multiples that Numba's need, and a scan's tensors for CUDA's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LANES = 16
"""Channels of a block: the floats of a vector."""

STATES = 4
"""States that are handled at once.

Four independent chains of arithmetic keep the processor's units busy.
"""

GPU_STATES = 16
"""States that the CUDA kernels handle at once."""

ROWS = 8
"""Rows, or columns, that a small matrix product handles at once."""

TAPS = 4
"""Taps of the convolution; fewer are padded in front."""

TILE = 64
"""Steps that a kernel handles at a time; gradients need the states at their starts."""


class ScanInputs(NamedTuple):
    """Tensors of a selective scan by channel, as `selective_scan` takes them.

    For the CUDA kernels u, delta, B, C and z are of one type, the others float32, all
    contiguous; B and C have the same groups.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None


def kept_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the states that Numba's forward keeps for its backward.

    Args:
        batch: Cases.
        length: Steps.
        channels: Channels, a multiple of 16.
        states: States, a multiple of 4.

    Returns:
        (batch, tiles, blocks, N, 16).
    """
    return batch, -(-length // TILE), channels // LANES, states, LANES


def pad_axis(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Put zeros behind an axis until its length is a multiple.

    Args:
        x: Any tensor.
        axis: Which axis, negative.
        multiple: At least 1.

    Returns:
        x itself where nothing is missing.
    """
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return F.pad(x, (0, 0) * (-axis - 1) + (0, missing))


def pad_rows(x: Tensor, groups: int) -> Tensor:
    """Pad the channels of each group of x (..., E) to a multiple of 16.

    Args:
        x: Last axis channels, group by group.
        groups: Number of groups.

    Returns:
        (..., groups * padded).
    """
    if x.shape[-1] // groups % LANES == 0:
        return x
    return pad_axis(x.unflatten(-1, (groups, -1)), -1, LANES).flatten(-2)


def unpad_rows(x: Tensor, groups: int, channels: int) -> Tensor:
    """Undo `pad_rows`.

    Args:
        x: (..., groups * padded).
        groups: Number of groups.
        channels: E before padding.

    Returns:
        (..., E).
    """
    if x.shape[-1] == channels:
        return x
    cut = x.unflatten(-1, (groups, -1))[..., : channels // groups]
    return cut.flatten(-2).contiguous()


def pad_split(x: Tensor, sizes: list[int], multiples: list[int]) -> Tensor:
    """Pad parts of the first axis, each to its own multiple.

    Args:
        x: (sum of sizes, columns).
        sizes: Lengths of the parts.
        multiples: What each part is padded to.

    Returns:
        The parts, padded, behind one another.
    """
    pairs = zip(x.split(sizes), multiples, strict=True)
    return torch.cat([pad_axis(part, -2, m) for part, m in pairs])


def pad_taps(weight: Tensor) -> Tensor:
    """Put zeros before fewer than 4 taps.

    Args:
        weight: (W, E), W up to 4.

    Returns:
        (4, E).
    """
    missing = TAPS - weight.shape[0]
    return F.pad(weight, (0, 0, missing, 0)) if missing else weight
