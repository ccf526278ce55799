"""The scan of a volume's tokens in several orders, as one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import GeometryError, describe
from segmamba.ops._layout import (
    LANES,
    STATES,
    pad_axis,
    pad_rows,
    pad_split,
    pad_taps,
)
from segmamba.ops._primitives import tri_scan
from segmamba.ops.backends import resolve_backend
from segmamba.ops.convolution import conv_limit, conv_rows
from segmamba.ops.orders import Order, check_orders, scan_order
from segmamba.ops.scan import compute_dtype, needs_gradient, scan, shape_error


def tri_orientated_scan(
    xz: Tensor,
    conv_weight: Sequence[Tensor],
    conv_bias: Sequence[Tensor],
    x_proj_weight: Sequence[Tensor],
    dt_proj_weight: Sequence[Tensor],
    dt_proj_bias: Sequence[Tensor],
    A_log: Sequence[Tensor],
    D: Sequence[Tensor],
    *,
    orders: Sequence[Order],
    backend: str = "auto",
) -> Tensor:
    """Scan tokens in K orders, sum the results and gate the sum once.

    For each order: u = silu(causal convolution of x along the order), the step sizes
    and the matrices B and C come from u by projections, then the selective scan. What
    lies between the input and output projections of a Mamba mixer.

    Args:
        xz: (batch, L, 2E), rows in token order; x first, the gate z last.
        conv_weight: K tensors (E, 1, W).
        conv_bias: K tensors (E).
        x_proj_weight: K tensors (r + 2N, E); rows give dt's code, B and C.
        dt_proj_weight: K tensors (E, r).
        dt_proj_bias: K tensors (E).
        A_log: K tensors (E, N); A = -exp(A_log).
        D: K tensors (E).
        orders: K pairs (stride S, reverse). Position t of a scan holds token
            (t mod S) * (L / S) + t // S; with reverse, the one of position L - 1 - t.
        backend: "auto", "reference", "chunked", "numba" or "cuda".

    Returns:
        (batch, L, E) in xz's type, rows in token order.

    Raises:
        GeometryError: Shapes don't fit each other, or a stride doesn't divide L.
        ConfigError: The back end is unknown.
        BackendUnavailableError: The named back end can't run this.

    Source:
        Xing et al., SegMamba, arXiv 2401.13560 (tri-orientated Mamba).
    """
    parameters = (
        conv_weight,
        conv_bias,
        x_proj_weight,
        dt_proj_weight,
        dt_proj_bias,
        A_log,
        D,
    )
    if xz.ndim != 3 or xz.shape[2] % 2:
        raise shape_error("xz", "(batch, L, 2E)", xz)
    check_orders(xz.shape[1], orders)
    check_parameters(xz.shape[2] // 2, parameters, orders)
    work = compute_dtype(xz, *A_log)
    limit = conv_limit(conv_weight[0].shape[-1])
    method = resolve_backend(backend, device=xz.device, dtype=work, numba_limit=limit)
    with torch.autocast(xz.device.type, enabled=False):
        directions = list(zip(*parameters, strict=True))
        if method == "numba":
            return _scan_fused(xz.to(work), directions, orders).to(xz.dtype)
        x, z = xz.to(work).chunk(2, dim=-1)
        total = torch.zeros_like(x)
        for order, direction in zip(orders, directions, strict=True):
            tokens = scan_order(x.shape[1], order, x.device)
            cast = tuple(p.to(work) for p in direction)
            y = _scan_direction(x[:, tokens], cast, method)
            total = total.index_add(1, tokens, y)
        return (total * F.silu(z)).to(xz.dtype)


def _scan_direction(x: Tensor, direction: tuple[Tensor, ...], backend: str) -> Tensor:
    """One direction's output for rows in scan order, before the gate."""
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = direction
    rank, states = dt_proj.shape[1], A_log.shape[1]
    u = conv_rows(x, conv_weight.squeeze(1), conv_bias, True, backend)
    code, B, C = F.linear(u, x_proj).split([rank, states, states], dim=-1)
    dt = F.softplus(F.linear(code, dt_proj, dt_bias))
    y, _ = scan(u, dt, -torch.exp(A_log), B.unsqueeze(2), C.unsqueeze(2), backend)
    return y + u * D


def _scan_fused(
    xz: Tensor, directions: Sequence[tuple[Tensor, ...]], orders: Sequence[Order]
) -> Tensor:
    """All directions by Numba in one operator, on channels padded for its kernels."""
    channels = xz.shape[2] // 2
    if channels % LANES:
        xz = pad_rows(xz, 2)
    parameters = [p for direction in directions for p in _pad_direction(direction)]
    out, _, _ = tri_scan(
        xz.contiguous(),
        parameters,
        [stride for stride, _ in orders],
        [int(reverse) for _, reverse in orders],
        needs_gradient(xz, *parameters),
    )
    return out[..., :channels] if channels % LANES else out


def _pad_direction(direction: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A direction's parameters as float32 in the layout of `_numba.tri_scan`.

    Channels that are added have u = 0, states that are added have B = C = 0.
    """
    cast = tuple(p.to(torch.float32) for p in direction)
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = cast
    states, rank = A_log.shape[1], dt_proj.shape[1]
    if states % STATES:
        x_proj = pad_split(x_proj, [rank, states, states], [1, STATES, STATES])
    padded = (
        pad_rows(pad_taps(conv_weight.squeeze(1).T), 1),
        pad_rows(conv_bias, 1),
        pad_rows(x_proj, 1),
        pad_rows(dt_proj.T, 1),
        pad_rows(dt_bias, 1),
        pad_rows(pad_axis(A_log, -1, STATES).T, 1).T,
        pad_rows(D, 1),
    )
    return tuple(p.contiguous() for p in padded)


def check_parameters(
    channels: int, parameters: Sequence[Sequence[Tensor]], orders: Sequence[Order]
) -> None:
    """Refuse parameters that don't fit each other.

    Args:
        channels: E.
        parameters: The seven lists that `tri_orientated_scan` takes.
        orders: K pairs.

    Raises:
        GeometryError: A list hasn't K tensors, or a tensor another shape.
    """
    counts = [len(p) for p in parameters]
    if not orders or set(counts) != {len(orders)}:
        raise GeometryError(
            describe(
                "every direction needs an order and one tensor of each parameter",
                expected=f"{max(1, len(orders))} of each",
                found=f"{len(orders)} orders and parameter counts {counts}",
            )
        )
    for direction in zip(*parameters, strict=True):
        _check_direction(channels, direction)


def _check_direction(channels: int, direction: tuple[Tensor, ...]) -> None:
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = direction
    if dt_proj.ndim != 2 or dt_proj.shape[0] != channels:
        raise shape_error("dt_proj_weight", f"({channels}, r)", dt_proj)
    if A_log.ndim != 2 or A_log.shape[0] != channels:
        raise shape_error("A_log", f"({channels}, N)", A_log)
    taps = conv_weight.shape[-1]
    if conv_weight.shape != (channels, 1, taps) or taps < 1:
        raise shape_error("conv_weight", f"({channels}, 1, W)", conv_weight)
    rows = dt_proj.shape[1] + 2 * A_log.shape[1]
    if x_proj.shape != (rows, channels):
        raise shape_error("x_proj_weight", f"({rows}, {channels})", x_proj)
    for name, vector in (("conv_bias", conv_bias), ("dt_proj_bias", dt_bias), ("D", D)):
        if vector.shape != (channels,):
            raise shape_error(name, f"({channels},)", vector)
