"""The parameters of a mixer's scan directions, as the GPU's kernels want them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel
from segmamba.ops._cuda.launch import STATES, ceil_divide, kind_of

Orders = tuple[tuple[int, bool], ...]

THREADS = 128
"""Of a block of mixer.cu."""

RUN = 16
"""Rows that a thread of a convolution does."""

_CODES = 8
"""The code's columns are padded to a multiple of this, for aligned rows."""


@dataclass(frozen=True)
class Form:
    """What a mixer's flat parameters don't say.

    Attributes:
        orders: Stride and direction of each of K directions.
        states: States N, at most 16.
        rank: Rank r of the step sizes' code.
        taps: Width W of the convolution.
    """

    orders: Orders
    states: int
    rank: int
    taps: int


@dataclass(frozen=True)
class Directions:
    """Parameters of K directions as the kernels want them; float32 but `projection`.

    taps (K, W, E), offset (K, E), weight (K, r, E), bias (K, E), rates (K, 16, E) with
    A / ln 2, skip (K, E), projection (K, P, E) with 16 rows for B, 16 for C, those for
    the code, and zeros; code_proj (K, r, E) and dt_proj (K, E, r) as the modules have
    them.
    """

    taps: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    rates: Tensor
    skip: Tensor
    projection: Tensor
    code_proj: Tensor
    dt_proj: Tensor
    orders: Orders

    def part(self, which: slice) -> Directions:
        """Give some directions."""
        if which == slice(0, len(self.orders)):
            return self
        *tensors, orders = vars(self).values()
        return Directions(*(t[which] for t in tensors), orders[which])


def _sizes(form: Form, channels: int) -> list[int]:
    """Numbers of each kind of parameter, in their order in `flat`."""
    lines = (form.taps, 1, form.rank + 2 * form.states, form.rank, 1, form.states, 1)
    return [len(form.orders) * channels * n for n in lines]


def arrange(flat: Tensor, form: Form, channels: int, kind: torch.dtype) -> Directions:
    """Arrange parameters in one launch.

    Args:
        flat: Taps (K, E, W), offsets (K, E), x_proj (K, r + 2N, E), dt_proj (K, E, r),
            dt_bias (K, E), A_log (K, E, N) and D (K, E) of K directions, one behind the
            other; float32.
        form: Their sizes.
        channels: E.
        kind: The projection's type.

    Returns:
        The directions.
    """
    count, taps, rank = len(form.orders), form.taps, form.rank
    _, offset, x_proj, dt_proj, bias, _, skip = flat.split(_sizes(form, channels))
    columns = 2 * STATES + ceil_divide(rank, _CODES) * _CODES
    lines = taps + rank + STATES
    out = flat.new_empty(count * lines * channels)
    projection = flat.new_empty(count, columns, channels, dtype=kind)
    threads = count * (lines + columns) * channels
    mixer_kernel(projection, "arrange", taps)(
        (ceil_divide(threads, THREADS), 1, 1),
        THREADS,
        flat,
        out,
        projection,
        count,
        channels,
        rank,
        form.states,
        columns,
    )
    parts = out.split([count * n * channels for n in (taps, rank, STATES)])
    taps_, weight, rates = (p.view(count, -1, channels) for p in parts)
    return Directions(
        taps=taps_,
        offset=offset.view(count, channels),
        weight=weight,
        bias=bias.view(count, channels),
        rates=rates,
        skip=skip.view(count, channels),
        projection=projection,
        code_proj=x_proj.view(count, -1, channels)[:, :rank],
        dt_proj=dt_proj.view(count, channels, rank),
        orders=form.orders,
    )


def mixer_kernel(like: Tensor, name: str, taps: int) -> Kernel:
    """Give a kernel of mixer.cu.

    Args:
        like: On the device, and of the type.
        name: The kernel.
        taps: Width W of the convolution.
    """
    constants = {"KIND": kind_of(like), "TAPS": taps, "RUN": RUN}
    return kernel("mixer.cu", name, like.device, **constants)
