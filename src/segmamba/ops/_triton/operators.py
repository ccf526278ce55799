"""The operators' Triton implementations: arguments brought to what kernels want.

Channels of a group come in multiples of 16, states too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segmamba.ops._layout import GPU_STATES, LANES, pad_axis, pad_rows, unpad_rows
from segmamba.ops._triton import tri_scan as fused
from segmamba.ops._triton.launch import (
    LOG2E,
    Scan,
    ceil_divide,
    kept_shape,
    run_backward,
    run_forward,
)

_ALONG = ((1, False),)


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return ceil_divide(count, multiple) * multiple


def scan_kept_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of what `scan_rows` keeps; arguments as there."""
    groups = B.shape[2]
    channels = groups * padded(u.shape[2] // groups, LANES)
    return kept_shape(*u.shape[:2], channels, padded(A.shape[1], GPU_STATES))


def tri_kept_shape(xz: Tensor, states: int, count: int) -> tuple[int, ...]:
    """Shape of what `tri_scan` keeps for `count` directions of `states` states."""
    batch, length, width = xz.shape
    return kept_shape(count * batch, length, width // 2, states)


def _scan_inputs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Scan:
    groups = B.shape[2]
    rates = pad_rows(pad_axis(A.mul(LOG2E).T, -2, GPU_STATES), groups)
    u = pad_rows(u, groups).contiguous()
    nothing = u.new_zeros(1, u.shape[2])
    return Scan(
        u=u,
        code=pad_rows(dt, groups).contiguous(),
        B=pad_axis(B, -1, GPU_STATES).flatten(2).contiguous(),
        C=pad_axis(C, -1, GPU_STATES).flatten(2).contiguous(),
        rates=rates.unsqueeze(0).contiguous(),
        weight=nothing.view(1, -1, 1)[..., :0],
        bias=nothing,
        skip=nothing,
        orders=_ALONG,
        groups=groups,
    )


def scan_rows(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan rows; as `scan_reference`, and with states kept for the backward.

    Args:
        u: (batch, L, E), float32 as all others.
        dt: (batch, L, E).
        A: (E, N).
        B: (batch, L, G, N).
        C: (batch, L, G, N).
        keep: Keep states.

    Returns:
        y (batch, L, E), the last state (batch, E, N), and kept states or nothing.
    """
    scan = _scan_inputs(u, dt, A, B, C)
    y = torch.empty_like(scan.u)
    kept = scan.new_slots()
    run_forward(scan, y, kept)
    groups, (channels, states) = B.shape[2], A.shape
    last = unpad_rows(kept[:, scan.chunks, :-1], groups, channels)
    last = last[:, :states].mT.clone(memory_format=torch.contiguous_format)
    return unpad_rows(y, groups, channels), last, kept if keep else u.new_empty(0)


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
    scan = _scan_inputs(u, dt, A, B, C)
    groups, (channels, states) = B.shape[2], A.shape
    last = pad_axis(pad_rows(grad_last.mT, groups), -2, GPU_STATES)
    grad_u = torch.empty_like(scan.u)
    rows = pad_rows(grad_y, groups).contiguous()
    found = run_backward(scan, kept, rows, grad_u, last)
    of_b, of_c = (
        g.unflatten(-1, (groups, -1))[..., :states].contiguous()
        for g in (found.B, found.C)
    )
    of_a = unpad_rows(found.A[0], groups, channels)[:states].T.contiguous()
    return (
        unpad_rows(grad_u, groups, channels),
        unpad_rows(found.steps, groups, channels),
        of_a,
        of_b,
        of_c,
    )


def tri_scan(
    xz: Tensor, parameters: Sequence[Tensor], orders: fused.Orders, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders; see `_triton.tri_scan.tri_scan`.

    Args:
        xz: (batch, L, 2E), contiguous.
        parameters: Seven a direction, taps (E, W), offset, x_proj, dt_proj, dt_bias,
            A_log and D, float32.
        orders: (stride, reverse) of each direction.
        keep: Keep what the backward needs.

    Returns:
        The gated sum, the sum before the gate, and what the scan keeps.
    """
    return fused.tri_scan(xz, fused.stack(parameters, orders), keep)


def tri_scan_backward(
    grad: Tensor,
    xz: Tensor,
    total: Tensor,
    kept: Tensor,
    parameters: Sequence[Tensor],
    orders: fused.Orders,
) -> list[Tensor]:
    """Differentiate `tri_scan`.

    Args:
        grad: Gradient of the gated sum.
        xz: As in `tri_scan`; so are parameters and orders.
        total: The sum before the gate.
        kept: What the scan kept.
        parameters: See xz.
        orders: See xz.

    Returns:
        Gradients of xz and of the seven kinds of parameters, directions stacked.
    """
    directions = fused.stack(parameters, orders)
    grad_xz, kinds = fused.tri_scan_backward(grad, xz, total, kept, directions)
    # Parts of one tensor are contiguous where there is one direction: an operator's
    # results must not share memory.
    return [grad_xz, *(k.clone(memory_format=torch.contiguous_format) for k in kinds)]
