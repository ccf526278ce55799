"""The operators' Numba implementations, on float32 tensors.

The kernels want channels in multiples of 16 and states in multiples of 4; the scan and
the convolution pad here, the tri-orientated scan is padded by its caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segmamba.ops._layout import LANES, STATES, pad_axis, pad_rows, unpad_rows
from segmamba.ops._numba.launch import (
    ScanInputs,
    block_rates,
    conv_plan,
    run_conv,
    run_conv_backward,
    run_gate,
    run_gate_backward,
    run_scan,
    run_scan_backward,
    scan_plan,
)
from segmamba.ops._numba.plan import ScanPlan, state_shape


def scan_rows(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan rows; as `scan_reference`, and with states kept for the backward.

    Args:
        u: (batch, L, E).
        dt: (batch, L, E).
        A: (E, N).
        B: (batch, L, G, N).
        C: (batch, L, G, N).
        keep: Keep states.

    Returns:
        y (batch, L, E), the last state (batch, E, N), and kept states or nothing.
    """
    plan, inputs = _scan_setup(u, dt, A, B, C)
    y = torch.empty_like(inputs.u)
    kept, last = run_scan(plan, inputs, y, accumulate=False, keep=keep)
    groups, (channels, states) = B.shape[2], A.shape
    last = last[:, 0].transpose(1, 2).flatten(2)
    last = unpad_rows(last, groups, channels)[:, :states].transpose(1, 2).contiguous()
    return unpad_rows(y, groups, channels), last, kept


def scan_rows_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `scan_rows`.

    Args:
        grad_y: (batch, L, E).
        grad_last: (batch, E, N).
        u: As given to `scan_rows`; so are dt, A, B and C.
        dt: See u.
        A: See u.
        B: See u.
        C: See u.
        kept: States that it kept.

    Returns:
        Gradients of u, dt, A, B and C.
    """
    plan, inputs = _scan_setup(u, dt, A, B, C)
    groups, (channels, states) = B.shape[2], A.shape
    last = pad_axis(pad_rows(grad_last.transpose(1, 2), groups), -2, STATES)
    last = last.unflatten(2, (-1, LANES)).transpose(1, 2).contiguous()
    rows = pad_rows(grad_y, groups).contiguous()
    grads = run_scan_backward(plan, inputs, kept, rows, last.unsqueeze(1))
    of_b, of_c = grads.matrices.unflatten(-1, (2, groups, -1)).unbind(2)
    return (
        unpad_rows(grads.u, groups, channels),
        unpad_rows(grads.steps, groups, channels),
        unpad_rows(grads.A.T, groups, channels)[:states].T.contiguous(),
        of_b[..., :states].contiguous(),
        of_c[..., :states].contiguous(),
    )


def _scan_setup(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[ScanPlan, ScanInputs]:
    groups = B.shape[2]
    B, C = pad_axis(B, -1, STATES), pad_axis(C, -1, STATES)
    A = pad_rows(pad_axis(A, -1, STATES).T, groups).T
    u, dt = pad_rows(u, groups), pad_rows(dt, groups)
    zero = u.new_zeros(u.shape[2])
    inputs = ScanInputs(
        u=u.contiguous(),
        code=dt.contiguous(),
        weight=zero,
        bias=zero,
        rates=block_rates(A),
        matrix_b=B.contiguous(),
        matrix_c=C.contiguous(),
        skip=zero,
    )
    return scan_plan(u, A.shape[1], matrices=groups), inputs


def conv_rows(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Convolve rows causally.

    Args:
        x: (batch, L, E).
        weight: (E, W).
        bias: (E).
        silu: Put silu on the result.

    Returns:
        (batch, L, E).
    """
    rows = pad_rows(x, 1)
    out = torch.empty_like(rows)
    taps, offset = pad_rows(weight.T, 1).contiguous(), pad_rows(bias, 1)
    plan = conv_plan(rows, rows.shape[2], taps.shape[0], (1, False), silu)
    run_conv(plan, rows, taps, offset, out)
    return unpad_rows(out, 1, x.shape[2])


def conv_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `conv_rows`.

    Args:
        grad: (batch, L, E).
        x: As in `conv_rows`.
        weight: As in `conv_rows`.
        bias: As in `conv_rows`.
        silu: As in `conv_rows`.

    Returns:
        Gradients of x, weight and bias.
    """
    rows, channels = pad_rows(x, 1), x.shape[2]
    taps, offset = pad_rows(weight.T, 1).contiguous(), pad_rows(bias, 1)
    plan = conv_plan(rows, rows.shape[2], taps.shape[0], (1, False), silu)
    grad_x = torch.empty_like(rows)
    of_taps, of_bias = run_conv_backward(
        plan, rows, taps, offset, pad_rows(grad, 1), grad_x, accumulate=False
    )
    return (
        unpad_rows(grad_x, 1, channels),
        unpad_rows(of_taps, 1, channels).T.contiguous(),
        unpad_rows(of_bias, 1, channels),
    )


Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Conv taps (W, E), conv bias (E), x_proj (r + 2N, E), dt_proj (r, E), its bias (E),
A_log (E, N) and D (E)."""


def tri_scan(
    xz: Tensor,
    directions: Sequence[Direction],
    orders: Sequence[tuple[int, bool]],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate.

    Args:
        xz: (batch, L, 2E).
        directions: Parameters of each order.
        orders: (stride, reverse) of each.
        keep: Keep what the backward needs.

    Returns:
        The gated sum (batch, L, E), the sum before the gate, and the kept states of all
        directions; the last two empty without `keep`.
    """
    channels = xz.shape[2] // 2
    u = xz.new_empty(*xz.shape[:2], channels)
    y, kept = torch.empty_like(u), []
    for k, (order, direction) in enumerate(zip(orders, directions, strict=True)):
        plan, inputs = _direction_setup(xz, u, order, direction)
        states, _ = run_scan(plan, inputs, y, accumulate=k > 0, keep=keep)
        kept.append(states)
    plan = conv_plan(xz, channels, 1, (1, False), False)
    if not keep:
        run_gate(plan, y, xz, y)
        return y, xz.new_empty(0), xz.new_empty(0)
    run_gate(plan, y, xz, u)
    return u, y, torch.stack(kept)


def _direction_setup(
    xz: Tensor, u: Tensor, order: tuple[int, bool], direction: Direction
) -> tuple[ScanPlan, ScanInputs]:
    """Convolve into u, and project it to what the scan needs."""
    taps, offset, x_proj, dt_proj, dt_bias, A_log, D = direction
    run_conv(conv_plan(xz, u.shape[2], taps.shape[0], order, True), xz, taps, offset, u)
    code = torch.matmul(u.flatten(0, 1), x_proj.T)
    rates = block_rates(-torch.exp(A_log))
    inputs = ScanInputs(u, code, dt_proj, dt_bias, rates, code, code, D)
    plan = scan_plan(u, A_log.shape[1], rank=dt_proj.shape[0], order=order)
    return plan, inputs


def tri_scan_backward(
    grad: Tensor,
    xz: Tensor,
    y: Tensor,
    kept: Tensor,
    directions: Sequence[Direction],
    orders: Sequence[tuple[int, bool]],
) -> tuple[Tensor, list[Direction]]:
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
    channels = y.shape[2]
    grad_xz, u = torch.empty_like(xz), torch.empty_like(y)
    gate = conv_plan(xz, channels, 1, (1, False), False)
    grad_y = run_gate_backward(gate, grad, y, xz, grad_xz)
    gradients = []
    for k, (order, direction) in enumerate(zip(orders, directions, strict=True)):
        taps, offset, x_proj, _, _, A_log, _ = direction
        plan, inputs = _direction_setup(xz, u, order, direction)
        last = torch.zeros(state_shape(plan, 1))
        scan = run_scan_backward(plan, inputs, kept[k], grad_y, last)
        codes = scan.matrices.flatten(0, 1)
        of_proj = torch.matmul(codes.T, u.flatten(0, 1))
        scan.u.flatten(0, 1).addmm_(codes, x_proj)
        of_taps, of_offset = run_conv_backward(
            conv_plan(xz, channels, taps.shape[0], order, True),
            xz,
            taps,
            offset,
            scan.u,
            grad_xz,
            accumulate=k > 0,
        )
        of_log = scan.A * -torch.exp(A_log)
        gradients.append(
            (of_taps, of_offset, of_proj, scan.weight, scan.bias, of_log, scan.skip)
        )
    return grad_xz, gradients
