"""The tri-orientated scan on a GPU: convolution, projection, scan and gate.

Short sequences are done all at once, for few launches; of long ones one direction of
one case at a time, for little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel
from segmamba.ops._cuda.launch import (
    LOG2E,
    STATES,
    Scan,
    ceil_divide,
    kept_shape,
    kind_of,
    order_table,
    run_backward,
    run_forward,
)

Orders = tuple[tuple[int, bool], ...]

_THREADS = 128

_RUN = 16
"""Rows that a thread of a convolution does."""

_EIGHT = 8
"""Channels of a thread."""

_CODES = 8
"""The code's columns are padded to a multiple of this, for aligned rows."""

_SUMMED = 132
"""Blocks along the rows, over all sequences, that sum gradients of taps."""

_SPLITS = (64, 16, 4)
"""Parts into which a long product over rows is cut, for the sake of parallel work."""

_LONG = 1 << 19
"""Tokens of a batch from which it is done in pieces."""


@dataclass(frozen=True)
class Directions:
    """Parameters of K directions as the kernels want them; float32 but `projection`.

    taps (K, W, E), offset (K, E), weight (K, r, E), bias (K, E), rates (K, N, E) with
    A / ln 2, skip (K, E), projection (K, P, E) with rows for B, C, the code and zeros;
    x_proj (K, r + 2N, E) and dt_proj (K, E, r) as the modules have them.
    """

    taps: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    rates: Tensor
    skip: Tensor
    projection: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    orders: Orders

    def part(self, which: slice) -> Directions:
        """Give some directions."""
        *tensors, orders = vars(self).values()
        return Directions(*(t[which] for t in tensors), orders[which])


def stack(parameters: Sequence[Tensor], orders: Orders, kind: torch.dtype) -> Directions:
    """Stack and arrange parameters, seven a direction, in two launches.

    Args:
        parameters: taps (E, W), offset, x_proj, dt_proj, dt_bias, A_log and D of the
            first direction, then of the next; float32, N = 16.
        orders: (stride, reverse) of each direction.
        kind: The projection's type.

    Returns:
        The directions.
    """
    count, kinds = len(orders), [parameters[i::7] for i in range(7)]
    flat = torch.cat([p.reshape(-1) for kind_ in kinds for p in kind_])
    sizes = [count * kind_[0].numel() for kind_ in kinds]
    stacked = [
        part.view(count, *kind_[0].shape)
        for part, kind_ in zip(flat.split(sizes), kinds, strict=True)
    ]
    _, offset, x_proj, dt_proj, bias, _, skip = stacked
    channels, taps = parameters[0].shape
    rank = dt_proj.shape[2]
    columns = 2 * STATES + ceil_divide(rank, _CODES) * _CODES
    lines = taps + rank + STATES
    out = flat.new_empty(count * lines * channels)
    projection = flat.new_empty(count, columns, channels, dtype=kind)
    threads = count * (lines + columns) * channels
    _kernel(projection, "arrange", taps)(
        (ceil_divide(threads, _THREADS), 1, 1),
        _THREADS,
        flat,
        out,
        projection,
        count,
        channels,
        rank,
        STATES,
        columns,
    )
    parts = out.split([count * n * channels for n in (taps, rank, STATES)])
    taps_, weight, rates = (p.view(count, -1, channels) for p in parts)
    return Directions(
        taps_, offset, weight, bias, rates, skip, projection, x_proj, dt_proj, orders
    )


def _kernel(like: Tensor, name: str, taps: int) -> Kernel:
    constants = {"KIND": kind_of(like), "TAPS": taps, "RUN": _RUN}
    return kernel("mixer.cu", name, like.device, **constants)


def _over_rows(rows: int, channels: int) -> int:
    """Blocks that do a number of rows, a thread eight channels of one."""
    return ceil_divide(rows * (channels // _EIGHT), _THREADS)


def _prepare(xz: Tensor, directions: Directions) -> Scan:
    """Convolve and project."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    u = xz.new_empty(count * batch, length, channels)
    _kernel(xz, "conv_silu", directions.taps.shape[1])(
        (_over_rows(ceil_divide(length, _RUN), channels), count * batch, 1),
        _THREADS,
        xz,
        directions.taps,
        directions.offset,
        order_table(directions.orders, xz.device),
        u,
        length,
        channels,
        batch,
    )
    code = torch.bmm(u.view(count, batch * length, channels), directions.projection.mT)
    code = code.view(count * batch, length, -1)
    return Scan(
        u=u,
        code=code[..., 2 * STATES :],
        B=code,
        C=code[..., STATES:],
        rates=directions.rates,
        weight=directions.weight,
        bias=directions.bias,
        skip=directions.skip,
        orders=directions.orders,
    )


def tri_scan(
    xz: Tensor, directions: Directions, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate.

    Args:
        xz: (batch, L, 2E), contiguous, E a multiple of 16.
        directions: Their parameters.
        keep: Keep what the backward needs.

    Returns:
        The gated sum (batch, L, E), the sum before the gate, and what the scan keeps
        (`launch.kept_shape`); the last two empty without `keep`.
    """
    batch, length, width = xz.shape
    count, channels = len(directions.orders), width // 2
    pieces = _pieces(batch, length, count)
    whole = len(pieces) == 1
    sums = count if whole else 1
    y = xz.new_empty(sums * batch, length, channels)
    shape = kept_shape(count * batch, length, channels)
    kept = xz.new_empty(shape, dtype=torch.float32)
    for which, cases in pieces:
        scan = _prepare(xz[cases], directions.part(which))
        rows = _rows(which, cases, batch)
        target = y if whole else y[cases]
        run_forward(scan, target, kept[rows], add=which.start > 0)
    out = xz.new_empty(batch, length, channels)
    total = torch.empty_like(out) if keep and sums > 1 else None
    _kernel(xz, "gate", directions.taps.shape[1])(
        (_over_rows(batch * length, channels), 1, 1),
        _THREADS,
        y,
        xz,
        total,
        out,
        batch * length,
        channels,
        sums,
    )
    if not keep:
        return out, xz.new_empty(0), xz.new_empty(0)
    return out, y if total is None else total, kept


def _pieces(batch: int, length: int, count: int) -> list[tuple[slice, slice]]:
    """(directions, cases) that are done at a time; each case's directions in order."""
    if batch * length < _LONG:
        return [(slice(0, count), slice(0, batch))]
    return [
        (slice(k, k + 1), slice(case, case + 1))
        for case in range(batch)
        for k in range(count)
    ]


def _rows(which: slice, cases: slice, batch: int) -> slice:
    """Rows of sequences of a piece, which is everything or one."""
    return slice(which.start * batch + cases.start, (which.stop - 1) * batch + cases.stop)


def tri_scan_backward(
    grad: Tensor, xz: Tensor, total: Tensor, kept: Tensor, directions: Directions
) -> tuple[Tensor, list[Tensor]]:
    """Differentiate `tri_scan`.

    Args:
        grad: Gradient of the gated sum.
        xz: As in `tri_scan`.
        total: The sum before the gate.
        kept: As `tri_scan` gave it.
        directions: As in `tri_scan`.

    Returns:
        The gradient of xz, and those of the seven stacked parameters.
    """
    batch, length, width = xz.shape
    channels = width // 2
    grad_xz, grad_y = torch.empty_like(xz), torch.empty_like(total)
    _kernel(xz, "gate_back", directions.taps.shape[1])(
        (_over_rows(batch * length, channels), 1, 1),
        _THREADS,
        grad,
        total,
        xz,
        grad_xz,
        grad_y,
        batch * length,
        channels,
    )
    pieces = _pieces(batch, length, len(directions.orders))
    found: dict[int, list[Tensor]] = {}
    for which, cases in pieces:
        gradients = _return(
            xz[cases],
            directions.part(which),
            kept[_rows(which, cases, batch)],
            grad_y[cases],
            grad_xz[cases],
            add=which.start > 0,
        )
        before = found.get(which.start)
        found[which.start] = (
            gradients if before is None else torch._foreach_add(before, gradients)
        )
    return grad_xz, [torch.cat(kind) for kind in zip(*found.values(), strict=True)]


def _return(
    xz: Tensor,
    directions: Directions,
    kept: Tensor,
    grad_y: Tensor,
    grad_xz: Tensor,
    *,
    add: bool,
) -> list[Tensor]:
    """Gradients of some directions' parameters; that of x goes into grad_xz.

    The step sizes' gradients go to u through one matrix, dt_proj times x_proj's rows
    for the code, and their product with u has all that both parameters need.
    """
    scan = _prepare(xz, directions)
    grad_u = torch.empty_like(scan.u)
    found = run_backward(scan, kept, grad_y, grad_u)
    count, rank = len(directions.orders), scan.rank
    flat_u, flat_grad, rows = (
        t.view(count, -1, t.shape[-1]) for t in (scan.u, grad_u, found.rows)
    )
    of_code, of_states = directions.x_proj[:, :rank], directions.x_proj[:, rank:]
    back = torch.cat([torch.bmm(directions.dt_proj, of_code), of_states], 1)
    flat_grad.baddbmm_(rows, back.to(xz.dtype))
    product = _product_over_rows(rows, flat_u)
    of_steps, shared = product.split([scan.channels, 2 * STATES], 1)
    of_x_proj = torch.cat([torch.bmm(directions.dt_proj.mT, of_steps), shared], 1)
    of_dt_proj = torch.bmm(of_steps, of_code.mT)
    of_taps, of_offset = _return_conv(xz, directions, grad_u, grad_xz, add=add)
    of_log = (found.A * directions.rates).mT * (1 / LOG2E)
    return [of_taps, of_offset, of_x_proj, of_dt_proj, found.bias, of_log, found.D]


def _product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Sum a^T b over rows: (K, rows, P), (K, rows, E) to (K, P, E), float32."""
    count, rows, _ = a.shape
    parts = next((n for n in _SPLITS if rows % n == 0 and rows >= 64 * n), 1)
    a, b = (t.view(count * parts, rows // parts, -1) for t in (a, b))
    product = torch.bmm(a.mT, b)
    return product.view(count, parts, *product.shape[1:]).sum(1, dtype=torch.float32)


def _return_conv(
    xz: Tensor, directions: Directions, grad_u: Tensor, grad_xz: Tensor, *, add: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of taps and offset; that of x goes into grad_xz."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    taps = directions.taps.shape[1]
    orders = order_table(directions.orders, xz.device)
    across = next(n for n in range(16, 0, -1) if channels // _EIGHT % n == 0)
    high = _THREADS // across
    runs = ceil_divide(ceil_divide(length, _RUN), high)
    blocks = min(runs, ceil_divide(_SUMMED * 4, count * batch))
    partial = directions.taps.new_empty(count, batch * blocks, taps + 1, channels)
    _kernel(xz, "conv_silu_back", taps)(
        (blocks, channels // _EIGHT // across, count * batch),
        across * high,
        xz,
        directions.taps,
        directions.offset,
        orders,
        grad_u,
        partial,
        length,
        channels,
        batch,
        across,
        shared=across * high * _EIGHT * 4,
    )
    _kernel(xz, "conv_input_back", taps)(
        (_over_rows(length, channels), batch, 1),
        _THREADS,
        grad_u,
        directions.taps,
        orders,
        grad_xz,
        length,
        channels,
        batch,
        count,
        int(add),
    )
    totals = partial.sum(1)
    return totals[:, :-1].mT, totals[:, -1]
