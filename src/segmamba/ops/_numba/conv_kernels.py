"""Kernels of the causal convolution with silu, for one task: some rows of one case.

Rows of x are read, and rows of its gradient written, in token order; rows of u are in
scan order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from segmamba.ops._layout import LANES, TILE
from segmamba.ops._numba.scan_kernels import list_tokens
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


class ConvPlan(NamedTuple):
    """Sizes and layout of one convolution; plain integers, as kernels take them."""

    batch: int
    length: int
    blocks: int
    taps: int
    stride: int
    reverse: int
    x_width: int
    """Floats of a row of x, of which the first `blocks` blocks are meant."""
    silu: int
    tiles: int
    tasks: int
    """Tasks of a case."""


@kernel
def _task_tiles(plan, task):
    part = task % plan.tasks
    begin = part * plan.tiles // plan.tasks
    return task // plan.tasks, begin, (part + 1) * plan.tiles // plan.tasks


@kernel
def _past_tokens(plan, start, count, tokens):
    """Tokens at start - W + 1 .. start + count - 1, and how many rows don't exist."""
    missing = max(0, plan.taps - 1 - start)
    begin = start - plan.taps + 1 + missing
    list_tokens(plan, begin, start + count - begin, tokens[missing:])
    return missing


@kernel
def _convolve(plan, row, t, missing, column, x, tokens, weight, bias):
    width = plan.blocks * LANES
    value = load(bias, column)
    for k in range(max(0, missing - t), plan.taps):
        place = (row + tokens[t + k]) * plan.x_width + column
        value = fma(load(x, place), load(weight, k * width + column), value)
    return value


@kernel
def conv_forward(task, plan, x, weight, bias, u):
    """u[p] = silu(bias + sum_k weight[k] x[token(p - W + 1 + k)])."""
    case, begin, end = _task_tiles(plan, task)
    width = plan.blocks * LANES
    row = case * plan.length
    tokens = np.empty(TILE + plan.taps, np.int64)
    for tile in range(begin, end):
        start = tile * TILE
        count = min(TILE, plan.length - start)
        missing = _past_tokens(plan, start, count, tokens)
        for t in range(count):
            for column in range(0, width, LANES):
                value = _convolve(
                    plan, row, t, missing, column, x, tokens, weight, bias
                )
                if plan.silu:
                    value = mul(value, sigmoid(value))
                store(u, (row + start + t) * width + column, value)


@kernel
def conv_backward(
    task, plan, x, weight, bias, grad_u, grad_x, accumulate, grad_weight, grad_bias
):
    """Gradients for a task's own rows; rows after them are recomputed, not shared.

    grad_x rows lie as x's do. grad_weight (tasks, W, E) and grad_bias (tasks, E) have a
    part for each task, zero at the start.
    """
    case, begin, end = _task_tiles(plan, task)
    width = plan.blocks * LANES
    row = case * plan.length
    ahead = plan.taps - 1
    tokens = np.empty(TILE + 2 * plan.taps, np.int64)
    inner = np.empty((TILE + ahead) * width, np.float32)
    of_weight = grad_weight[task * plan.taps * width : (task + 1) * plan.taps * width]
    of_bias = grad_bias[task * width : (task + 1) * width]
    for tile in range(begin, end):
        start = tile * TILE
        own = min(TILE, plan.length - start)
        count = min(TILE + ahead, plan.length - start)
        missing = _past_tokens(plan, start, count, tokens)
        for t in range(count):
            for column in range(0, width, LANES):
                value = load(grad_u, (row + start + t) * width + column)
                if plan.silu:
                    before = _convolve(
                        plan, row, t, missing, column, x, tokens, weight, bias
                    )
                    value = mul(value, _silu_slope(before))
                store(inner, t * width + column, value)
        for t in range(own):
            _return_row(
                plan,
                row,
                t,
                count,
                missing,
                x,
                tokens,
                weight,
                inner,
                grad_x,
                accumulate,
                of_weight,
                of_bias,
            )


@kernel
def _silu_slope(value):
    """D silu(v) / dv = s + v s (1 - s), s the sigmoid."""
    gate = sigmoid(value)
    return fma(mul(value, gate), sigmoid(mul(value, splat(_MINUS_ONE))), gate)


@kernel
def _return_row(
    plan,
    row,
    t,
    count,
    missing,
    x,
    tokens,
    weight,
    inner,
    grad_x,
    accumulate,
    of_weight,
    of_bias,
):
    """One row's gradient of x, and what the row adds to those of taps and bias."""
    width = plan.blocks * LANES
    last = plan.taps - 1
    for column in range(0, width, LANES):
        here = load(inner, t * width + column)
        store(of_bias, column, add(here, load(of_bias, column)))
        for k in range(max(0, missing - t), plan.taps):
            place = k * width + column
            value = load(x, (row + tokens[t + k]) * plan.x_width + column)
            store(of_weight, place, fma(value, here, load(of_weight, place)))
        at = (row + tokens[t + last]) * plan.x_width + column
        gradient = load(grad_x, at) if accumulate else zeros()
        for k in range(max(0, last + t + 1 - count), plan.taps):
            later = load(inner, (t + last - k) * width + column)
            gradient = fma(later, load(weight, k * width + column), gradient)
        store(grad_x, at, gradient)


@kernel
def gate_forward(task, plan, y, xz, out):
    """Out = y silu(z), z being the second half of xz's rows; out may be y."""
    case, begin, end = _task_tiles(plan, task)
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
    case, begin, end = _task_tiles(plan, task)
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
