"""Kernels of the projection from u to step size code, B and C, and of its gradients.

Written here and not left to a matrix library because slabs are small: waking its
threads would take longer than the product, above all on a busy machine.
"""

from __future__ import annotations

from segmamba.ops._layout import LANES, ROWS, TILE
from segmamba.ops._numba.rows import floats, split_rows
from segmamba.ops._numba.tasks import kernel
from segmamba.ops._numba.vectors import add, fma, load, splat_at, store, zeros


@kernel
def multiply_rows(a, a_first, a_width, b, b_width, depth, out, out_first, count, more):
    """Out (+)= a b for rows of a and out, 8 at a time; b is (depth, b_width).

    Rows of a are a_width floats apart, from float a_first on; `more` adds to out.
    """
    whole = count // ROWS * ROWS
    for t in range(0, whole, ROWS):
        at = a_first + t * a_width
        for column in range(0, b_width, LANES):
            s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
            s4, s5, s6, s7 = zeros(), zeros(), zeros(), zeros()
            for q in range(depth):
                part = load(b, q * b_width + column)
                s0 = fma(splat_at(a, at + q), part, s0)
                s1 = fma(splat_at(a, at + a_width + q), part, s1)
                s2 = fma(splat_at(a, at + 2 * a_width + q), part, s2)
                s3 = fma(splat_at(a, at + 3 * a_width + q), part, s3)
                s4 = fma(splat_at(a, at + 4 * a_width + q), part, s4)
                s5 = fma(splat_at(a, at + 5 * a_width + q), part, s5)
                s6 = fma(splat_at(a, at + 6 * a_width + q), part, s6)
                s7 = fma(splat_at(a, at + 7 * a_width + q), part, s7)
            place = out_first + t * b_width + column
            put(out, place, s0, more)
            put(out, place + b_width, s1, more)
            put(out, place + 2 * b_width, s2, more)
            put(out, place + 3 * b_width, s3, more)
            put(out, place + 4 * b_width, s4, more)
            put(out, place + 5 * b_width, s5, more)
            put(out, place + 6 * b_width, s6, more)
            put(out, place + 7 * b_width, s7, more)
    for t in range(whole, count):
        at = a_first + t * a_width
        for column in range(0, b_width, LANES):
            s0 = zeros()
            for q in range(depth):
                s0 = fma(splat_at(a, at + q), load(b, q * b_width + column), s0)
            put(out, out_first + t * b_width + column, s0, more)


@kernel
def put(out, place, value, more):
    """Write a vector, or add it to what is there."""
    if more:
        value = add(value, load(out, place))
    store(out, place, value)


@kernel
def add_outer(codes, code_width, u, u_first, u_width, count, out):
    """Out (code_width, u_width) += codes^T u over a tile's rows; 8 codes at a time."""
    for q in range(0, code_width, ROWS):
        for column in range(0, u_width, LANES):
            s0, s1, s2, s3 = zeros(), zeros(), zeros(), zeros()
            s4, s5, s6, s7 = zeros(), zeros(), zeros(), zeros()
            for t in range(count):
                row = load(u, u_first + t * u_width + column)
                at = t * code_width + q
                s0 = fma(splat_at(codes, at), row, s0)
                s1 = fma(splat_at(codes, at + 1), row, s1)
                s2 = fma(splat_at(codes, at + 2), row, s2)
                s3 = fma(splat_at(codes, at + 3), row, s3)
                s4 = fma(splat_at(codes, at + 4), row, s4)
                s5 = fma(splat_at(codes, at + 5), row, s5)
                s6 = fma(splat_at(codes, at + 6), row, s6)
                s7 = fma(splat_at(codes, at + 7), row, s7)
            place = q * u_width + column
            put(out, place, s0, 1)
            put(out, place + u_width, s1, 1)
            put(out, place + 2 * u_width, s2, 1)
            put(out, place + 3 * u_width, s3, 1)
            put(out, place + 4 * u_width, s4, 1)
            put(out, place + 5 * u_width, s5, 1)
            put(out, place + 6 * u_width, s6, 1)
            put(out, place + 7 * u_width, s7, 1)


@kernel
def projection_backward(
    task, plan, groups, width, partial, projection, u, grad_u, grad_projection
):
    """Add what comes through the projection to grad_u.

    partial (groups, batch, pitch, width) are gradients of code, B and C by channel
    group. projection is (width padded to 8, E); grad_projection has one for each task,
    zero at the start.
    """
    case, begin, end = split_rows(plan, task)
    channels = plan.blocks * LANES
    padded = -(-width // ROWS) * ROWS
    codes = floats(TILE * padded)
    codes[:] = 0.0
    size = padded * channels
    of_projection = grad_projection[task * size : (task + 1) * size]
    for tile in range(begin, end):
        count = min(TILE, plan.rows - tile * TILE)
        first = case * plan.pitch + tile * TILE
        for t in range(count):
            for q in range(width):
                value = partial[(first + t) * width + q]
                for g in range(1, groups):
                    row = g * plan.batch * plan.pitch + first + t
                    value += partial[row * width + q]
                codes[t * padded + q] = value
        multiply_rows(
            codes,
            0,
            padded,
            projection,
            channels,
            padded,
            grad_u,
            first * channels,
            count,
            1,
        )
        add_outer(codes, padded, u, first * channels, channels, count, of_projection)
