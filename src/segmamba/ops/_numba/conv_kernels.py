"""Kernels of convolution, projection and gate, for one task: some rows of one case.

Rows of x are read, and rows of its gradient written, in token order; rows of u are in
scan order. The convolution has 4 taps; fewer are padded with zeros in front.
"""

from __future__ import annotations

import numpy as np

from segmamba.ops._layout import LANES, TAPS, TILE
from segmamba.ops._numba.projection_kernels import multiply_rows
from segmamba.ops._numba.rows import list_tokens, split_rows
from segmamba.ops._numba.tasks import kernel
from segmamba.ops._numba.vectors import (
    add,
    fma,
    load,
    mul,
    sigmoid,
    splat,
    store,
    zeros,
)

_MINUS_ONE = np.float32(-1.0)


@kernel
def _past_tokens(plan, start, count, tokens):
    """Tokens at start - 3 .. start + count - 1; -1 where there is none."""
    missing = max(0, TAPS - 1 - start)
    tokens[:missing] = -1
    begin = start - TAPS + 1 + missing
    list_tokens(plan, begin, start + count - begin, tokens[missing:])


@kernel
def _load_row(plan, x, row, token, column):
    if token < 0:
        return zeros()
    return load(x, (row + token) * plan.x_width + column)


@kernel
def _silu_slope(value):
    """D silu(v) / dv = s + v s (1 - s), s the sigmoid."""
    gate = sigmoid(value)
    return fma(mul(value, gate), sigmoid(mul(value, splat(_MINUS_ONE))), gate)


@kernel
def _convolve_block(plan, case, count, first, column, x, tokens, weight, bias, u):
    """A tile's block: u = silu(bias + sum_k weight[k] x[t - 3 + k])."""
    width = plan.blocks * LANES
    row = case * plan.length
    w0, w1 = load(weight, column), load(weight, width + column)
    w2, w3 = load(weight, 2 * width + column), load(weight, 3 * width + column)
    offset = load(bias, column)
    x0 = _load_row(plan, x, row, tokens[0], column)
    x1 = _load_row(plan, x, row, tokens[1], column)
    x2 = _load_row(plan, x, row, tokens[2], column)
    for t in range(count):
        x3 = load(x, (row + tokens[t + 3]) * plan.x_width + column)
        value = fma(x3, w3, fma(x2, w2, fma(x1, w1, fma(x0, w0, offset))))
        if plan.silu:
            value = mul(value, sigmoid(value))
        store(u, (first + t) * width + column, value)
        x0, x1, x2 = x1, x2, x3


@kernel
def conv_forward(task, plan, x, weight, bias, projection, u, code):
    """Convolve a task's rows, and project them if the plan has columns."""
    case, begin, end = split_rows(plan, task)
    width = plan.blocks * LANES
    tokens = np.empty(TILE + TAPS, np.int64)
    for tile in range(begin, end):
        start = plan.offset + tile * TILE
        count = min(TILE, plan.offset + plan.rows - start)
        first = case * plan.pitch + tile * TILE
        _past_tokens(plan, start, count, tokens)
        for column in range(0, width, LANES):
            _convolve_block(
                plan, case, count, first, column, x, tokens, weight, bias, u
            )
        if plan.columns > 0:
            multiply_rows(
                u,
                first * width,
                width,
                projection,
                plan.columns,
                width,
                code,
                first * plan.columns,
                count,
                0,
            )


@kernel
def _return_block(
    plan,
    case,
    own,
    count,
    first,
    column,
    x,
    tokens,
    weight,
    bias,
    grad_u,
    grad_x,
    accumulate,
    of_weight,
    of_bias,
):
    """A tile's block: gradients of its own rows of x, and its share of the others.

    Walks on over the 3 rows behind, whose gradients reach back to the tile's own.
    """
    width = plan.blocks * LANES
    row = case * plan.length
    w0, w1 = load(weight, column), load(weight, width + column)
    w2, w3 = load(weight, 2 * width + column), load(weight, 3 * width + column)
    offset = load(bias, column)
    x0 = _load_row(plan, x, row, tokens[0], column)
    x1 = _load_row(plan, x, row, tokens[1], column)
    x2 = _load_row(plan, x, row, tokens[2], column)
    g0, g1, g2 = zeros(), zeros(), zeros()
    s0, s1, s2, s3, total = zeros(), zeros(), zeros(), zeros(), zeros()
    for t in range(own + TAPS - 1):
        g3 = zeros()
        if t < count:
            x3 = load(x, (row + tokens[t + 3]) * plan.x_width + column)
            g3 = load(grad_u, (first + t) * width + column)
            if plan.silu:
                value = fma(x3, w3, fma(x2, w2, fma(x1, w1, fma(x0, w0, offset))))
                g3 = mul(g3, _silu_slope(value))
            if t < own:
                s0, s1 = fma(x0, g3, s0), fma(x1, g3, s1)
                s2, s3 = fma(x2, g3, s2), fma(x3, g3, s3)
                total = add(total, g3)
            x0, x1, x2 = x1, x2, x3
        if t >= TAPS - 1:
            at = (row + tokens[t]) * plan.x_width + column
            gradient = load(grad_x, at) if accumulate else zeros()
            gradient = fma(g0, w3, fma(g1, w2, fma(g2, w1, fma(g3, w0, gradient))))
            store(grad_x, at, gradient)
        g0, g1, g2 = g1, g2, g3
    store(of_bias, column, add(total, load(of_bias, column)))
    store(of_weight, column, add(s0, load(of_weight, column)))
    at = width + column
    store(of_weight, at, add(s1, load(of_weight, at)))
    at += width
    store(of_weight, at, add(s2, load(of_weight, at)))
    at += width
    store(of_weight, at, add(s3, load(of_weight, at)))


@kernel
def conv_backward(
    task, plan, x, weight, bias, grad_u, grad_x, accumulate, grad_weight, grad_bias
):
    """Gradients for a task's own rows; rows after them are recomputed, not shared.

    grad_u holds, behind the slab, the 3 rows that follow it. grad_x rows lie as x's do.
    grad_weight (tasks, 4, E) and grad_bias (tasks, E) start at zero.
    """
    case, begin, end = split_rows(plan, task)
    width = plan.blocks * LANES
    tokens = np.empty(TILE + 2 * TAPS, np.int64)
    of_weight = grad_weight[task * TAPS * width : (task + 1) * TAPS * width]
    of_bias = grad_bias[task * width : (task + 1) * width]
    for tile in range(begin, end):
        start = plan.offset + tile * TILE
        own = min(TILE, plan.offset + plan.rows - start)
        count = min(own + TAPS - 1, plan.length - start)
        first = case * plan.pitch + tile * TILE
        _past_tokens(plan, start, count, tokens)
        for column in range(0, width, LANES):
            _return_block(
                plan,
                case,
                own,
                count,
                first,
                column,
                x,
                tokens,
                weight,
                bias,
                grad_u,
                grad_x,
                accumulate,
                of_weight,
                of_bias,
            )


@kernel
def gate_forward(task, plan, y, xz, out):
    """Out = y silu(z), z being the second half of xz's rows; out may be y."""
    case, begin, end = split_rows(plan, task)
    width = plan.blocks * LANES
    first = case * plan.length + begin * TILE
    last = case * plan.length + min(plan.length, end * TILE)
    for row in range(first, last):
        for column in range(0, width, LANES):
            z = load(xz, row * 2 * width + width + column)
            place = row * width + column
            store(out, place, mul(load(y, place), mul(z, sigmoid(z))))


@kernel
def gate_backward(task, plan, grad, y, xz, grad_y, grad_xz):
    """grad_y = grad silu(z), and the second half of grad_xz's rows."""
    case, begin, end = split_rows(plan, task)
    width = plan.blocks * LANES
    first = case * plan.length + begin * TILE
    last = case * plan.length + min(plan.length, end * TILE)
    for row in range(first, last):
        for column in range(0, width, LANES):
            at = row * 2 * width + width + column
            place = row * width + column
            z, arrived = load(xz, at), load(grad, place)
            store(grad_y, place, mul(arrived, mul(z, sigmoid(z))))
            store(grad_xz, at, mul(mul(arrived, load(y, place)), _silu_slope(z)))
