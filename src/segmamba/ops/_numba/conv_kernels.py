"""Kernels of the causal convolution with silu, for one task: some rows of one case.

Rows of x are read, and rows of its gradient written, in token order; rows of u are in
scan order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from segmamba.ops._numba.plan import TILE
from segmamba.ops._numba.scan_kernels import list_tokens
from segmamba.ops._numba.tasks import kernel
from segmamba.ops._numba.vectors import LANES, add, fma, load, mul, sigmoid, splat
from segmamba.ops._numba.vectors import store, zeros


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
