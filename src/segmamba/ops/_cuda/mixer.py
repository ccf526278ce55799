"""The mixer of a Mamba layer on a GPU: projections, convolution, scan and gate.

Short sequences are done all at once, for few launches; of long ones one direction of
one case at a time, for little memory.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.ops._cuda.directions import (
    RUN,
    THREADS,
    Directions,
    Form,
    arrange,
    mixer_kernel,
)
from segmamba.ops._cuda.launch import (
    LOG2E,
    STATES,
    Scan,
    ceil_divide,
    kept_shape,
    order_table,
    run_backward,
    run_forward,
)

_EIGHT = 8
"""Channels of a thread."""

_SUMMED = 3 * 132
"""Blocks that sum gradients of taps: as many as a large GPU does at once."""

_SPLITS = (64, 16, 4)
"""Parts into which a long product over rows is cut, for the sake of parallel work."""

_LONG = 1 << 19
"""Tokens from which they are done in pieces."""


def _over_rows(rows: int, channels: int) -> int:
    """Blocks that do a number of rows, a thread eight channels of one."""
    return ceil_divide(rows * (channels // _EIGHT), THREADS)


def _prepare(xz: Tensor, directions: Directions) -> Scan:
    """Convolve and project."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    u = xz.new_empty(count * batch, length, channels)
    mixer_kernel(xz, "conv_silu", directions.taps.shape[1])(
        (_over_rows(ceil_divide(length, RUN), channels), count * batch, 1),
        THREADS,
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


def mix(
    tokens: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    flat: Tensor,
    form: Form,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project, scan tokens in several orders, sum, gate, and project.

    Args:
        tokens: (batch, L, C).
        in_proj: (2E, C), E a multiple of 8, in the tokens' type.
        out_proj: (C, E), in the tokens' type.
        flat: As in `arrange`.
        form: Its sizes, and the orders.
        keep: Keep what the backward needs.

    Returns:
        (batch, L, C), the sum before the gate (batch, L, E), and what the scan keeps
        (`launch.kept_shape`); the last two empty without `keep`.
    """
    batch, length, _ = tokens.shape
    channels, count = out_proj.shape[1], len(form.orders)
    directions = arrange(flat, form, channels, tokens.dtype)
    xz = F.linear(tokens, in_proj)
    shape = kept_shape(count * batch, length, channels)
    kept = tokens.new_empty(shape, dtype=torch.float32)
    gated = tokens.new_empty(batch, length, channels)
    total = torch.empty_like(gated) if keep else None
    ways = _cut(count, length)
    for cases in _cut(batch, batch * length):
        y = tokens.new_empty(
            (cases.stop - cases.start) * count // len(ways), length, channels
        )
        for which in ways:
            _scan(
                xz[cases],
                directions.part(which),
                y,
                _part(kept, which, cases, form),
                add=which.start > 0,
            )
        kept_sum = None if total is None else total[cases]
        _gate(y, xz[cases], kept_sum, gated[cases], form.taps)
        del y  # before the next one is made
    out = F.linear(gated, out_proj)
    if total is None:
        return out, tokens.new_empty(0), tokens.new_empty(0)
    return out, total, kept


def _scan(
    xz: Tensor, directions: Directions, y: Tensor, kept: Tensor, *, add: bool
) -> None:
    """Convolve, project and scan; what that needs is freed at once."""
    run_forward(_prepare(xz, directions), y, kept, add=add)


def _cut(count: int, tokens: int) -> list[slice]:
    """All of a count at once, or one by one if tokens are many."""
    if tokens < _LONG:
        return [slice(0, count)]
    return [slice(i, i + 1) for i in range(count)]


def _gate(
    y: Tensor, xz: Tensor, total: Tensor | None, gated: Tensor, taps: int
) -> None:
    """Sum y over directions into total, and put the gate on the sum."""
    batch, length, channels = gated.shape
    mixer_kernel(xz, "gate", taps)(
        (_over_rows(batch * length, channels), 1, 1),
        THREADS,
        y,
        xz,
        total,
        gated,
        batch * length,
        channels,
        y.shape[0] // batch,
    )


def _part(kept: Tensor, which: slice, cases: slice, form: Form) -> Tensor:
    """What is kept of some directions of some cases.

    Rows are (K, batch), or (batch, K) where cases are done one by one.
    """
    count = len(form.orders)
    if (cases.stop - cases.start) * count == kept.shape[0]:
        return kept[which] if which.stop - which.start < count else kept
    return kept.unflatten(0, (-1, count))[cases.start, which]


def mix_backward(
    grad: Tensor,
    tokens: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    flat: Tensor,
    total: Tensor,
    kept: Tensor,
    form: Form,
) -> list[Tensor]:
    """Differentiate `mix`.

    Args:
        grad: Gradient of the output.
        tokens: As in `mix`; so are in_proj, out_proj, flat and form.
        in_proj: See tokens.
        out_proj: See tokens.
        flat: See tokens.
        total: As `mix` gave it.
        kept: As `mix` gave it.
        form: See tokens.

    Returns:
        The gradients of tokens, in_proj, out_proj and flat.
    """
    batch, length, _ = tokens.shape
    channels, count = out_proj.shape[1], len(form.orders)
    directions = arrange(flat, form, channels, tokens.dtype)
    xz = F.linear(tokens, in_proj)
    grad = grad.contiguous()
    grad_y = grad @ out_proj
    gated = torch.empty_like(grad_y)
    # z makes room for its gradient, the gated sum's gradient for the sum's
    mixer_kernel(xz, "gate_back", form.taps)(
        (_over_rows(batch * length, channels), 1, 1),
        THREADS,
        grad_y,
        total,
        xz,
        gated,
        batch * length,
        channels,
    )
    of_out_proj = _flat_rows(grad).mT @ _flat_rows(gated)
    del gated
    grad_x, long = xz[..., :channels], batch * length
    if long >= _LONG:
        grad_x = torch.empty_like(grad_y)
    found: dict[int, list[Tensor]] = {}
    for cases, which in itertools.product(_cut(batch, long), _cut(count, long)):
        gradients = _return(
            xz[cases],
            directions.part(which),
            _part(kept, which, cases, form),
            grad_y[cases],
            grad_x[cases],
            form,
            add=which.start > 0,
        )
        before = found.get(which.start, gradients)
        if before is not gradients:
            gradients = [a + b for a, b in zip(before, gradients, strict=True)]
        found[which.start] = gradients
    if long >= _LONG:
        xz[..., :channels] = grad_x
    kinds = zip(*found.values(), strict=True)
    of_flat = torch.cat([x.reshape(-1) for kind in kinds for x in kind])
    of_in_proj = _flat_rows(xz).mT @ _flat_rows(tokens)
    return [xz @ in_proj, of_in_proj, of_out_proj, of_flat]


def _flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _return(
    xz: Tensor,
    directions: Directions,
    kept: Tensor,
    grad_y: Tensor,
    grad_x: Tensor,
    form: Form,
    *,
    add: bool,
) -> list[Tensor]:
    """Gradients of some directions' parameters; that of x goes into grad_x.

    The step sizes' gradients go to u through one matrix, dt_proj times x_proj's rows
    for the code, and their product with u has all that both parameters need.
    """
    scan = _prepare(xz, directions)
    grad_u = torch.empty_like(scan.u)
    found = run_backward(scan, kept, grad_y, grad_u)
    count, states = len(directions.orders), form.states
    flat_u, flat_grad, rows = (
        t.view(count, -1, t.shape[-1]) for t in (scan.u, grad_u, found.rows)
    )
    dt_proj, code_proj = directions.dt_proj, directions.code_proj
    steps = torch.bmm(dt_proj, code_proj).to(xz.dtype)
    shared = directions.projection[:, : 2 * STATES]
    flat_grad.baddbmm_(rows, torch.cat([steps, shared], 1))
    product = _product_over_rows(rows, flat_u)
    of_steps, of_b, of_c = product.split([scan.channels, STATES, STATES], 1)
    of_code = torch.bmm(dt_proj.mT, of_steps)
    of_x_proj = torch.cat([of_code, of_b[:, :states], of_c[:, :states]], 1)
    of_dt_proj = torch.bmm(of_steps, code_proj.mT)
    of_taps, of_offset = _return_conv(xz, directions, grad_u, grad_x, add=add)
    of_log = ((found.A * directions.rates).mT * (1 / LOG2E))[..., :states]
    return [of_taps, of_offset, of_x_proj, of_dt_proj, found.bias, of_log, found.D]


def _product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Sum a^T b over rows: (K, rows, P), (K, rows, E) to (K, P, E), float32."""
    count, rows, _ = a.shape
    parts = next((n for n in _SPLITS if rows % n == 0 and rows >= 64 * n), 1)
    a, b = (t.view(count * parts, rows // parts, -1) for t in (a, b))
    product = torch.bmm(a.mT, b)
    return product.view(count, parts, *product.shape[1:]).sum(1, dtype=torch.float32)


def _return_conv(
    xz: Tensor, directions: Directions, grad_u: Tensor, grad_x: Tensor, *, add: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of taps and offset; that of x goes into grad_x."""
    batch, length, width = xz.shape
    channels, count = width // 2, len(directions.orders)
    taps = directions.taps.shape[1]
    orders = order_table(directions.orders, xz.device)
    across = next(n for n in range(16, 0, -1) if channels // _EIGHT % n == 0)
    high = THREADS // across
    runs = ceil_divide(ceil_divide(length, RUN), high)
    blocks = min(runs, ceil_divide(_SUMMED, count * batch))
    partial = directions.taps.new_empty(count, batch * blocks, taps + 1, channels)
    mixer_kernel(xz, "conv_silu_back", taps)(
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
    mixer_kernel(xz, "conv_input_back", taps)(
        (_over_rows(length, channels), batch, 1),
        THREADS,
        grad_u,
        directions.taps,
        orders,
        grad_x,
        length,
        channels,
        grad_x.stride(-2),
        batch,
        count,
        int(add),
    )
    totals = partial.sum(1)
    return totals[:, :-1].mT, totals[:, -1]
