"""The operators' CUDA implementations: arguments brought to what kernels want.

Channels of a group come in multiples of 16, states in slices of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segmamba.ops._cuda.launch import (
    LOG2E,
    STATES,
    Scan,
    ceil_divide,
    kept_shape,
    run_backward,
    run_forward,
)
from segmamba.ops._layout import LANES, pad_axis, pad_rows, unpad_rows

_ALONG = ((1, False),)


def scan_kept_shape(u: Tensor, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """Shape of what `scan_rows` keeps; arguments as there."""
    groups = B.shape[2]
    channels = groups * ceil_divide(u.shape[2] // groups, LANES) * LANES
    return ceil_divide(A.shape[1], STATES), *kept_shape(*u.shape[:2], channels)


def _scans(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[Scan]:
    """One scan for each 16 states; their outputs add up."""
    groups = B.shape[2]
    rates = pad_rows(pad_axis(A.mul(LOG2E).T, -2, STATES), groups)
    B, C = (pad_axis(x, -1, STATES) for x in (B, C))
    u, dt = (pad_rows(x, groups).contiguous() for x in (u, dt))
    nothing = u.new_zeros(1, u.shape[2])
    return [
        Scan(
            u=u,
            code=dt,
            B=B[..., n : n + STATES].flatten(2).contiguous(),
            C=C[..., n : n + STATES].flatten(2).contiguous(),
            rates=rates[None, n : n + STATES].contiguous(),
            weight=None,
            bias=None,
            skip=nothing,
            orders=_ALONG,
            groups=groups,
        )
        for n in range(0, B.shape[-1], STATES)
    ]


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
    scans = _scans(u, dt, A, B, C)
    y = torch.empty_like(scans[0].u)
    kept = u.new_empty(scan_kept_shape(u, A, B))
    for i, scan in enumerate(scans):
        run_forward(scan, y, kept[i], add=i > 0)
    groups, (channels, states) = B.shape[2], A.shape
    last = unpad_rows(kept[:, :, -1, :-1], groups, channels)
    last = last.transpose(0, 1).flatten(1, 2)[:, :states].mT
    last = last.clone(memory_format=torch.contiguous_format)
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
    groups, (channels, states) = B.shape[2], A.shape
    last = pad_axis(pad_rows(grad_last.mT, groups), -2, STATES)
    rows = pad_rows(grad_y, groups).contiguous()
    of_u, of_dt, of_a, of_b, of_c = [], [], [], [], []
    for i, scan in enumerate(_scans(u, dt, A, B, C)):
        grad_u = torch.empty_like(scan.u)
        part = last[:, i * STATES : (i + 1) * STATES]
        found = run_backward(scan, kept[i], rows, grad_u, part)
        shared = [scan.channels, groups * STATES, groups * STATES]
        steps, *of_states = found.rows.split(shared, -1)
        of_u.append(grad_u)
        of_dt.append(steps)
        of_a.append(found.A[0])
        for kind, x in zip((of_b, of_c), of_states, strict=True):
            kind.append(x.unflatten(-1, (groups, STATES)))
    return (
        unpad_rows(sum(of_u[1:], of_u[0]), groups, channels),
        unpad_rows(sum(of_dt[1:], of_dt[0]), groups, channels).contiguous(),
        unpad_rows(torch.cat(of_a), groups, channels)[:states].T.contiguous(),
        torch.cat(of_b, -1)[..., :states].contiguous(),
        torch.cat(of_c, -1)[..., :states].contiguous(),
    )
