"""The tri-orientated scan on a GPU: convolution, projection, scan and gate.

Short sequences are done all at once, for few launches; of long ones one direction of
one case at a time, for little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._triton import conv_kernels
from segmamba.ops._triton.launch import (
    LANES,
    LOG2E,
    Scan,
    ceil_divide,
    kept_shape,
    order_table,
    run_backward,
    run_forward,
)

Orders = tuple[tuple[int, bool], ...]

_ROWS = 32
"""Rows of a tile."""

_TILES = 8
"""Tiles of a program that sums over rows."""

_SPLITS = (64, 16, 4)
"""Parts into which a long product over rows is cut, for the sake of parallel work."""

_CODES = 8
"""The code's columns are padded to a multiple of this, for aligned rows."""

_LONG = 1 << 19
"""Tokens of a batch from which it is done in pieces."""


@dataclass(frozen=True)
class Directions:
    """Parameters of K directions, stacked; all float32.

    taps (K, E, W), offset (K, E), x_proj (K, r + 2N, E), dt_proj (K, E, r),
    dt_bias (K, E), A_log (K, E, N), D (K, E).
    """

    taps: Tensor
    offset: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    orders: Orders

    @property
    def states(self) -> int:
        return self.A_log.shape[2]

    @property
    def rank(self) -> int:
        return self.dt_proj.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.taps,
            self.offset,
            self.x_proj,
            self.dt_proj,
            self.dt_bias,
            self.A_log,
            self.D,
        )

    def part(self, which: slice) -> Directions:
        """Give some directions."""
        return Directions(*(t[which] for t in self.tensors), self.orders[which])

    def projection(self, kind: torch.dtype) -> Tensor:
        """Give x_proj with B's rows first, then C's, the code's, zeros: (K, P, E)."""
        rank, states = self.rank, self.states
        columns = 2 * states + ceil_divide(rank, _CODES) * _CODES
        shape = (len(self.orders), columns, self.x_proj.shape[2])
        weight = torch.zeros(shape, dtype=kind, device=self.x_proj.device)
        weight[:, : 2 * states] = self.x_proj[:, rank:]
        weight[:, 2 * states : 2 * states + rank] = self.x_proj[:, :rank]
        return weight

    def rates(self) -> Tensor:
        """A / ln 2, (K, N, E)."""
        rates = torch.empty_like(self.A_log.mT, memory_format=torch.contiguous_format)
        return torch.exp(self.A_log.mT, out=rates).mul_(-LOG2E)


def stack(parameters: Sequence[Tensor], orders: Orders) -> Directions:
    """Stack parameters, seven a direction, with one copy.

    Args:
        parameters: taps (E, W), offset, x_proj, dt_proj, dt_bias, A_log and D of the
            first direction, then of the next.
        orders: (stride, reverse) of each direction.

    Returns:
        The directions.
    """
    count = len(orders)
    kinds = [parameters[i::7] for i in range(7)]
    flat = torch.cat([p.reshape(-1) for kind in kinds for p in kind]).float()
    sizes = [count * kind[0].numel() for kind in kinds]
    parts = zip(flat.split(sizes), kinds, strict=True)
    return Directions(*(p.view(count, *k[0].shape) for p, k in parts), orders)


def _grid(length: int, channels: int, rows: int) -> tuple[int, int, int]:
    return ceil_divide(length, _ROWS), ceil_divide(channels, LANES), rows


_TILE = {"BT": _ROWS, "BE": LANES, "num_warps": 4}


def _prepare(xz: Tensor, directions: Directions, projection: Tensor) -> Scan:
    """Convolve and project."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    u = xz.new_empty(count * batch, length, channels)
    conv_kernels.conv_silu[_grid(length, channels, count * batch)](
        xz,
        directions.taps,
        directions.offset,
        order_table(directions.orders, xz.device),
        u,
        length,
        channels,
        batch,
        W=directions.taps.shape[2],
        **_TILE,
    )
    code = torch.bmm(u.view(count, batch * length, channels), projection.mT)
    code = code.view(count * batch, length, -1)
    states = directions.states
    return Scan(
        u=u,
        code=code[..., 2 * states :],
        B=code,
        C=code[..., states:],
        rates=directions.rates(),
        weight=directions.dt_proj,
        bias=directions.dt_bias,
        skip=directions.D,
        orders=directions.orders,
    )


def tri_scan(
    xz: Tensor, directions: Directions, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate.

    Args:
        xz: (batch, L, 2E), contiguous, E a multiple of 4.
        directions: Their parameters, N a multiple of 16.
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
    shape = kept_shape(count * batch, length, channels, directions.states)
    kept = xz.new_empty(shape, dtype=torch.float32)
    for which, cases in pieces:
        part = directions.part(which)
        scan = _prepare(xz[cases], part, part.projection(xz.dtype))
        rows = _rows(which, cases, batch)
        target = y if whole else y[cases]
        run_forward(scan, target, kept[rows], add=which.start > 0)
    out = xz.new_empty(batch, length, channels)
    total = y if sums == 1 else torch.empty_like(out)
    conv_kernels.gate[_grid(batch * length, channels, 1)](
        y,
        xz,
        total,
        out,
        batch * length,
        channels,
        K=sums,
        KEEP=keep and sums > 1,
        **_TILE,
    )
    return (out, total, kept) if keep else (out, xz.new_empty(0), xz.new_empty(0))


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
    """Rows of sequences of a piece among those of all directions and cases."""
    first = which.start * batch + cases.start
    count = (which.stop - which.start) * (cases.stop - cases.start)
    return slice(first, first + count)


def tri_scan_backward(
    grad: Tensor,
    xz: Tensor,
    total: Tensor,
    kept: Tensor,
    directions: Directions,
) -> tuple[Tensor, list[Tensor]]:
    """Differentiate `tri_scan`; convolution and projection are done again.

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
    conv_kernels.gate_back[_grid(batch * length, channels, 1)](
        grad, total, xz, grad_xz, grad_y, batch * length, channels, **_TILE
    )
    pieces = _pieces(batch, length, len(directions.orders))
    if len(pieces) == 1:
        return grad_xz, _return(xz, directions, kept, grad_y, grad_xz, add=False)
    gradients = [torch.zeros_like(t) for t in directions.tensors]
    for which, cases in pieces:
        found = _return(
            xz[cases],
            directions.part(which),
            kept[_rows(which, cases, batch)],
            grad_y[cases],
            grad_xz[cases],
            add=which.start > 0,
        )
        for total_of_kind, part in zip(gradients, found, strict=True):
            total_of_kind[which] += part
    return grad_xz, gradients


def _return(
    xz: Tensor,
    directions: Directions,
    kept: Tensor,
    grad_y: Tensor,
    grad_xz: Tensor,
    *,
    add: bool,
) -> list[Tensor]:
    """Gradients of some directions' parameters; that of x goes into grad_xz."""
    batch, length, _ = xz.shape
    count, rank = len(directions.orders), directions.rank
    columns = batch * length
    projection = directions.projection(xz.dtype)
    scan = _prepare(xz, directions, projection)
    grad_u = torch.empty_like(scan.u)
    found = run_backward(scan, kept, grad_y, grad_u)
    of_steps = found.steps.view(count, columns, -1)
    dt_proj = directions.dt_proj.to(xz.dtype)
    of_code = torch.bmm(of_steps, dt_proj)
    code = scan.code.reshape(count, columns, -1)[..., :rank]
    of_dt_proj = _product_over_rows(of_steps, code)
    parts = (of_code, found.B.view(count, columns, -1), found.C.view_as(found.B))
    of_columns = torch.cat(
        [parts[0], *(p.reshape(count, columns, -1) for p in parts[1:])], -1
    )
    x_proj = directions.x_proj.to(xz.dtype)
    flat_u, flat_grad = (t.view(count, columns, -1) for t in (scan.u, grad_u))
    of_x_proj = _product_over_rows(of_columns, flat_u)
    flat_grad.baddbmm_(of_columns, x_proj)
    of_taps, of_offset = _return_conv(xz, directions, grad_u, grad_xz, add=add)
    of_log = found.A.mT * -torch.exp(directions.A_log)
    return [of_taps, of_offset, of_x_proj, of_dt_proj, found.bias, of_log, found.D]


def _product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Sum a^T b over rows: (K, rows, P), (K, rows, E) to (K, P, E), float32."""
    count, rows, _ = a.shape
    parts = next((n for n in _SPLITS if rows % n == 0 and rows >= 64 * n), 1)
    a, b = (t.reshape(count * parts, rows // parts, -1) for t in (a, b))
    product = torch.bmm(a.mT, b)
    return product.view(count, parts, *product.shape[1:]).sum(1, dtype=torch.float32)


def _return_conv(
    xz: Tensor, directions: Directions, grad_u: Tensor, grad_xz: Tensor, *, add: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of taps and offset; that of x goes into grad_xz."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    taps = directions.taps.shape[2]
    orders = order_table(directions.orders, xz.device)
    tiles, *others = _grid(length, channels, count * batch)
    programs = ceil_divide(tiles, _TILES)
    partial = directions.taps.new_empty(count, batch * programs, taps + 1, channels)
    conv_kernels.conv_silu_back[(programs, *others)](
        xz,
        directions.taps,
        directions.offset,
        orders,
        grad_u,
        partial,
        length,
        channels,
        batch,
        W=taps,
        TILES=_TILES,
        **_TILE,
    )
    conv_kernels.conv_input_back[_grid(length, channels, batch)](
        grad_u,
        directions.taps,
        orders,
        grad_xz,
        length,
        channels,
        batch,
        K=count,
        W=taps,
        ADD=add,
        **_TILE,
    )
    totals = partial.sum(1)
    return totals[:, :-1].mT, totals[:, -1]
