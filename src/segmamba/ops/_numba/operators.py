"""The operators' Numba implementations, on float32 tensors.

The kernels want channels in multiples of 16, states in multiples of 4, and 4 taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segmamba.ops._layout import LANES, STATES, pad_axis, pad_rows, pad_taps, unpad_rows
from segmamba.ops._numba.launch import (
    ScanInputs,
    block_rates,
    conv_plan,
    partial_sums,
    run_conv,
    run_conv_backward,
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
    kept = torch.empty(state_shape(plan, plan.all_tiles) if keep else 0)
    first = torch.zeros(state_shape(plan, 1))
    last = run_scan(plan, inputs, first, kept, y, accumulate=False)
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
    grad_u = torch.empty_like(inputs.u)
    grads = run_scan_backward(
        plan, inputs, kept, rows, last.unsqueeze(1), grad_u, partial_sums(plan)
    )
    of_b, of_c = grads.matrices.sum(0).unflatten(-1, (2, groups, -1)).unbind(2)
    return (
        unpad_rows(grad_u, groups, channels),
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
    return scan_plan(*u.shape, A.shape[1], matrices=groups), inputs


def conv_rows(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Convolve rows causally.

    Args:
        x: (batch, L, E).
        weight: (E, W), W up to 4.
        bias: (E).
        silu: Put silu on the result.

    Returns:
        (batch, L, E).
    """
    rows = pad_rows(x, 1)
    out = torch.empty_like(rows)
    taps, offset = pad_rows(pad_taps(weight.T), 1).contiguous(), pad_rows(bias, 1)
    plan = conv_plan(rows, rows.shape[2], (1, False), silu=silu)
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
    taps, offset = pad_rows(pad_taps(weight.T), 1).contiguous(), pad_rows(bias, 1)
    plan = conv_plan(rows, rows.shape[2], (1, False), silu=silu)
    grad_x = torch.empty_like(rows)
    of_taps, of_bias = run_conv_backward(
        plan, rows, taps, offset, pad_rows(grad, 1), grad_x, accumulate=False
    )
    return (
        unpad_rows(grad_x, 1, channels),
        unpad_rows(of_taps, 1, channels)[-weight.shape[1] :].T.contiguous(),
        unpad_rows(of_bias, 1, channels),
    )
