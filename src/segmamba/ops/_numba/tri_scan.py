"""The tri-orientated scan by Numba, slab by slab.

A slab is so many positions of a scan that its rows of u stay in the cache between
convolution, projection and scan. Nothing by position is held for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._layout import LANES, ROWS, TAPS, TILE, kept_shape, pad_axis
from segmamba.ops._numba.launch import (
    ScanInputs,
    block_rates,
    conv_plan,
    partial_sums,
    run_conv,
    run_conv_backward,
    run_gate,
    run_gate_backward,
    run_projection_backward,
    run_scan,
    run_scan_backward,
    scan_plan,
)
from segmamba.ops._numba.plan import ConvPlan, ScanPlan, state_shape

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Conv taps (4, E), conv bias (E), x_proj (r + 2N, E), dt_proj (r, E), its bias (E),
A_log (E, N) and D (E)."""

_SLAB_FLOATS = 1 << 20
"""Floats of a slab's u: 4 MiB."""


@dataclass(frozen=True)
class _Walk:
    """One direction's parameters in the kernels' form, and buffers of one slab."""

    xz: Tensor
    order: tuple[int, bool]
    direction: Direction
    u: Tensor
    code: Tensor
    projection: Tensor
    rates: Tensor

    @property
    def channels(self) -> int:
        return self.u.shape[2]

    def plan(self, slab: tuple[int, int]) -> ScanPlan:
        batch, length, _ = self.xz.shape
        return scan_plan(
            batch,
            length,
            self.channels,
            self.rates.shape[1],
            slab=slab,
            pitch=self.u.shape[1],
            rank=self.direction[3].shape[0],
            width=self.code.shape[2],
            order=self.order,
        )

    def conv_plan(self, slab: tuple[int, int]) -> ConvPlan:
        return conv_plan(
            self.xz,
            self.channels,
            self.order,
            slab=slab,
            pitch=self.u.shape[1],
            columns=self.code.shape[2],
        )

    def prepare(self, slab: tuple[int, int]) -> ScanInputs:
        """Convolve and project a slab."""
        taps, offset, _, dt_proj, dt_bias, _, D = self.direction
        plan = self.conv_plan(slab)
        run_conv(plan, self.xz, taps, offset, self.u, self.projection, self.code)
        code = self.code
        return ScanInputs(self.u, code, dt_proj, dt_bias, self.rates, code, code, D)


def _slabs(batch: int, length: int, channels: int) -> list[tuple[int, int]]:
    """(first position, number of positions) of each slab; firsts are tiles' starts."""
    rows = max(1, _SLAB_FLOATS // (batch * channels * TILE)) * TILE
    return [(p, min(rows, length - p)) for p in range(0, length, rows)]


def _walks(
    xz: Tensor, directions: Sequence[Direction], orders: Sequence[tuple[int, bool]]
) -> Iterator[_Walk]:
    batch, length, width = xz.shape
    rows = _slabs(batch, length, width // 2)[0][1]
    pitch = rows + TAPS - 1
    u = xz.new_empty(batch, pitch, width // 2)
    for order, direction in zip(orders, directions, strict=True):
        projection = pad_axis(direction[2].T, -1, LANES).contiguous()
        code = xz.new_empty(batch, pitch, projection.shape[1])
        rates = block_rates(-torch.exp(direction[5]))
        yield _Walk(xz, order, direction, u, code, projection, rates)


def tri_scan(
    xz: Tensor,
    directions: Sequence[Direction],
    orders: Sequence[tuple[int, bool]],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate.

    Args:
        xz: (batch, L, 2E), E a multiple of 16.
        directions: Parameters of each order, N a multiple of 4.
        orders: (stride, reverse) of each.
        keep: Keep what the backward needs.

    Returns:
        The gated sum (batch, L, E), the sum before the gate, and the kept states of all
        directions; the last two empty without `keep`.
    """
    batch, length, width = xz.shape
    channels, states = width // 2, directions[0][5].shape[1]
    y = xz.new_empty(batch, length, channels)
    shape = (len(orders), *kept_shape(batch, length, channels, states))
    kept = xz.new_empty(shape if keep else (len(orders), 0))
    for k, walk in enumerate(_walks(xz, directions, orders)):
        state = xz.new_zeros(batch, 1, channels // LANES, states, LANES)
        for slab in _slabs(batch, length, channels):
            inputs = walk.prepare(slab)
            plan = walk.plan(slab)
            state = run_scan(plan, inputs, state, kept[k], y, accumulate=k > 0)
    gate = conv_plan(xz, channels, (1, False))
    out = torch.empty_like(y) if keep else y
    run_gate(gate, y, xz, out)
    return (out, y, kept) if keep else (out, xz.new_empty(0), xz.new_empty(0))


def tri_scan_backward(
    grad: Tensor,
    xz: Tensor,
    y: Tensor,
    kept: Tensor,
    directions: Sequence[Direction],
    orders: Sequence[tuple[int, bool]],
) -> tuple[Tensor, list[list[Tensor]]]:
    """Differentiate `tri_scan`; convolutions and projections are done again.

    Args:
        grad: Gradient of the gated sum.
        xz: As in `tri_scan`.
        y: The sum before the gate.
        kept: Kept states.
        directions: As in `tri_scan`.
        orders: As in `tri_scan`.

    Returns:
        Gradients of xz and of each direction's parameters.
    """
    grad_xz = torch.empty_like(xz)
    gate = conv_plan(xz, y.shape[2], (1, False))
    grad_y = run_gate_backward(gate, grad, y, xz, grad_xz)
    gradients, grad_u = [], None
    for k, walk in enumerate(_walks(xz, directions, orders)):
        grad_u = torch.empty_like(walk.u) if grad_u is None else grad_u
        gradients.append(_return_walk(walk, kept[k], grad_y, grad_u, grad_xz, k > 0))
    return grad_xz, gradients


def _return_walk(
    walk: _Walk,
    kept: Tensor,
    grad_y: Tensor,
    grad_u: Tensor,
    grad_xz: Tensor,
    accumulate: bool,
) -> list[Tensor]:
    """Gradients of a direction's parameters; adds to the first half of grad_xz."""
    batch, length, _ = walk.xz.shape
    slabs = _slabs(batch, length, walk.channels)
    totals = [torch.zeros_like(p) for i, p in enumerate(walk.direction) if i != 2]
    plan = walk.plan(slabs[0])
    adjoint, partial = torch.zeros(state_shape(plan, 1)), partial_sums(plan)
    x_proj = pad_axis(walk.direction[2], -2, ROWS)
    tasks = batch * walk.conv_plan(slabs[0]).tasks
    of_proj = x_proj.new_zeros(tasks, *x_proj.shape)
    for slab in reversed(slabs):
        inputs, plan, rows = walk.prepare(slab), walk.plan(slab), slab[1]
        behind = grad_u[:, : TAPS - 1].clone()
        scan = run_scan_backward(plan, inputs, kept, grad_y, adjoint, grad_u, partial)
        adjoint = scan.before
        conv = walk.conv_plan(slab)
        run_projection_backward(conv, scan.matrices, x_proj, walk.u, grad_u, of_proj)
        grad_u[:, rows : rows + TAPS - 1] = behind
        taps, offset = walk.direction[:2]
        of_conv = run_conv_backward(
            conv, walk.xz, taps, offset, grad_u, grad_xz, accumulate=accumulate
        )
        of_log = scan.A * -torch.exp(walk.direction[5])
        parts = (*of_conv, scan.weight, scan.bias, of_log, scan.skip)
        for total, part in zip(totals, parts, strict=True):
            total += part
    totals.insert(2, of_proj.sum(0)[: walk.direction[2].shape[0]])
    return totals
