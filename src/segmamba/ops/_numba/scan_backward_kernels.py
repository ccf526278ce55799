"""Kernels of the selective scan's gradients for one task: some channels of some rows.

Tiles are walked from the last to the first. Within a tile the states are recomputed
from the kept one at its start, then the adjoint states are walked back.
"""

from __future__ import annotations

import math

import numpy as np

from segmamba.ops._layout import LANES, STATES, TILE
from segmamba.ops._numba.rows import floats, list_tokens
from segmamba.ops._numba.scan_kernels import (
    copy_state,
    fill_steps,
    split_task,
)
from segmamba.ops._numba.tasks import kernel
from segmamba.ops._numba.vectors import (
    add,
    exp2,
    fma,
    fold,
    load,
    load_wide,
    mul,
    splat,
    splat_wide,
    store,
    total,
    totals,
    widen,
    zeros,
)

_LN2 = np.float32(math.log(2.0))


@kernel
def take_rows(plan, case, first, last, count, tokens, source, rows):
    """Copy a tile's rows from token order into scan order."""
    width = plan.blocks * LANES
    lane = (last - first) * LANES
    for t in range(count):
        place = (case * plan.length + tokens[t]) * width + first * LANES
        for i in range(0, lane, LANES):
            store(rows, t * lane + i, load(source, place + i))


@kernel
def replay_tile(
    plan, case, block, start, count, u, dt, rates, matrix_b, state, decays, history
):
    """Walk a tile's block again, keeping decays and states.

    history[t] is the state before step t; decays[t] the factor that step t applies.
    """
    width = plan.blocks * LANES
    shared = block // plan.blocks_per_matrix * plan.states
    size = plan.states * LANES
    copy_state(plan, state, 0, history, 0)
    for t in range(count):
        row = case * plan.pitch + start - plan.offset + t
        step = load(dt, t * LANES)
        value = load(u, row * width + block * LANES)
        steps, drive = widen(step), widen(mul(step, value))
        b_row = row * plan.width + plan.b_first + shared
        for n in range(0, plan.states, STATES):
            place = t * size + n * LANES
            rate = load_wide(rates, (block * plan.states + n) * LANES)
            decay = exp2(mul(steps, rate))
            store(decays, place, decay)
            decayed = mul(decay, load_wide(history, place))
            now = fma(drive, splat_wide(matrix_b, b_row + n), decayed)
            store(history, place + size, now)


@kernel
def return_tile(
    plan,
    case,
    block,
    start,
    count,
    u,
    dt,
    rates,
    matrix_b,
    matrix_c,
    skip,
    decays,
    history,
    grad_y,
    lane,
    adjoint,
    grad_rates,
    grad_skip,
    grad_u,
    grad_dt,
    sums,
):
    """Walk a tile's block back.

    Reads grad_y rows, `lane` floats apart. Adds to adjoint, grad_rates and grad_skip of
    this block, and to sums (T, rank + 2N, 16), gradients of code, B and C before they
    are summed over channels. Writes grad_u rows in place and grad_dt of the tile.
    """
    width = plan.blocks * LANES
    column = block * LANES
    size = plan.states * LANES
    shared = block // plan.blocks_per_matrix * plan.states
    ln2 = splat(_LN2)
    for back in range(count):
        t = count - 1 - back
        row = case * plan.pitch + start - plan.offset + t
        step, value = load(dt, t * LANES), load(u, row * width + column)
        arrived = load(grad_y, t * lane)
        steps, drive, arriving = widen(step), widen(mul(step, value)), widen(arrived)
        b_row = row * plan.width + plan.b_first + shared
        c_row = row * plan.width + plan.c_first + shared
        sum_b = (t * (plan.rank + 2 * plan.states) + plan.rank) * LANES
        sum_c = sum_b + size
        of_drive, of_exponent = widen(zeros()), widen(zeros())
        for n in range(0, plan.states, STATES):
            i = n * LANES
            place = t * size + i
            now = fma(arriving, splat_wide(matrix_c, c_row + n), load_wide(adjoint, i))
            store(sums, sum_b + i, fma(now, drive, load_wide(sums, sum_b + i)))
            state = load_wide(history, place + size)
            store(sums, sum_c + i, fma(arriving, state, load_wide(sums, sum_c + i)))
            of_drive = fma(now, splat_wide(matrix_b, b_row + n), of_drive)
            passed = mul(now, load_wide(decays, place))
            store(adjoint, i, passed)
            exponent = mul(passed, load_wide(history, place))
            rate = load_wide(rates, block * size + i)
            of_exponent = fma(exponent, rate, of_exponent)
            store(grad_rates, i, fma(exponent, steps, load_wide(grad_rates, i)))
        through = fold(of_drive)
        of_skip = fma(arrived, value, load(grad_skip, column))
        store(grad_skip, column, of_skip)
        of_u = fma(arrived, load(skip, column), mul(through, step))
        store(grad_u, row * width + column, of_u)
        of_dt = fma(through, value, mul(fold(of_exponent), ln2))
        store(grad_dt, t * LANES, of_dt)


@kernel
def return_steps(
    plan,
    case,
    block,
    start,
    count,
    code,
    weight,
    slope,
    grad_dt,
    grad_weight,
    grad_bias,
    sums,
):
    """Go back from step sizes to their code, weight and bias."""
    width = plan.blocks * LANES
    column = block * LANES
    for t in range(count):
        row = case * plan.pitch + start - plan.offset + t
        value = mul(load(grad_dt, t * LANES), load(slope, t * LANES))
        store(grad_bias, column, add(value, load(grad_bias, column)))
        for q in range(plan.rank):
            place = q * width + column
            part = splat(code[row * plan.width + q])
            store(grad_weight, place, fma(part, value, load(grad_weight, place)))
            at = (t * (plan.rank + 2 * plan.states) + q) * LANES
            store(sums, at, fma(value, load(weight, place), load(sums, at)))


@kernel
def sum_span(sums, source, partial, target, count):
    """Write the totals of `count` vectors."""
    whole = count // LANES * LANES
    for n in range(0, whole, LANES):
        store(partial, target + n, totals(sums, source + n * LANES))
    for n in range(whole, count):
        partial[target + n] = total(load(sums, source + n * LANES))


@kernel
def sum_channels(plan, case, group, block, start, count, sums, partial):
    """Sum a tile's gradients of code, B and C over the channels of this task."""
    states = plan.states
    matrices = plan.blocks // plan.blocks_per_matrix
    matrix = block // plan.blocks_per_matrix
    width = plan.rank + 2 * states * matrices
    span = plan.rank + 2 * states
    for t in range(count):
        row = (group * plan.batch + case) * plan.pitch + start - plan.offset + t
        source = t * span * LANES
        target = row * width
        if matrices == 1:
            sum_span(sums, source, partial, target, span)
            continue
        target += matrix * states
        sum_span(sums, source, partial, target, states)
        source += states * LANES
        sum_span(sums, source, partial, target + matrices * states, states)


@kernel
def adjoint_segment(
    task, plan, grad_y, code, weight, bias, rates, matrix_c, begins, dt_sums
):
    """Walk a segment back from a zero adjoint: the one before it, and the sum of dt."""
    case, first, last, begin, end, _, segment = split_task(plan, task)
    size = plan.states * LANES
    dt = floats(TILE * LANES)
    no_slope = np.empty(0, np.float32)
    rows = floats(TILE * LANES)
    tokens = np.empty(TILE, np.int64)
    adjoint = floats(size)
    for block in range(first, last):
        shared = block // plan.blocks_per_matrix * plan.states
        adjoint[:] = 0.0
        passed = zeros()
        for tile in range(end - 1, begin - 1, -1):
            start = plan.offset + tile * TILE
            count = min(TILE, plan.offset + plan.rows - start)
            fill_steps(
                plan, case, block, start, count, code, weight, bias, dt, no_slope
            )
            list_tokens(plan, start, count, tokens)
            take_rows(plan, case, block, block + 1, count, tokens, grad_y, rows)
            for t in range(count - 1, -1, -1):
                row = case * plan.pitch + start - plan.offset + t
                c_row = row * plan.width + plan.c_first
                step = load(dt, t * LANES)
                passed = add(passed, step)
                arriving, steps = widen(load(rows, t * LANES)), widen(step)
                for n in range(0, plan.states, STATES):
                    i = n * LANES
                    rate = load_wide(rates, block * size + i)
                    now = fma(
                        arriving,
                        splat_wide(matrix_c, c_row + shared + n),
                        load_wide(adjoint, i),
                    )
                    store(adjoint, i, mul(now, exp2(mul(steps, rate))))
        place = (case * plan.segments + segment) * plan.blocks + block
        copy_state(plan, adjoint, 0, begins, place * size)
        store(dt_sums, place * LANES, passed)


@kernel
def scan_backward(
    task,
    plan,
    u,
    code,
    weight,
    bias,
    rates,
    matrix_b,
    matrix_c,
    skip,
    kept,
    ends,
    grad_y,
    before,
    grad_u,
    grad_steps,
    grad_rates,
    grad_weight,
    grad_bias,
    grad_skip,
    partial,
):
    """Gradients of a segment, from the adjoint that enters it from behind.

    grad_rates, grad_weight, grad_bias and grad_skip have a row for each case and
    segment, zero at the start; partial has one for each group; before is the adjoint
    that leaves the slab at its front.
    """
    case, first, last, begin, end, group, segment = split_task(plan, task)
    size = plan.states * LANES
    width = plan.blocks * LANES
    lane = (last - first) * LANES
    dt = floats(TILE * LANES)
    slope = floats(TILE * LANES if plan.rank > 0 else 0)
    grad_dt = floats(TILE * LANES)
    decays = floats(TILE * size)
    history = floats((TILE + 1) * size)
    rows = floats(TILE * lane)
    sums = floats(TILE * (plan.rank + 2 * plan.states) * LANES)
    tokens = np.empty(TILE, np.int64)
    place = case * plan.segments + segment
    of_rates = grad_rates[place * plan.blocks * size : (place + 1) * plan.blocks * size]
    of_weight = grad_weight[place * plan.rank * width : (place + 1) * plan.rank * width]
    of_bias = grad_bias[place * width : (place + 1) * width]
    of_skip = grad_skip[place * width : (place + 1) * width]
    at = (place * plan.blocks + first) * size
    adjoint = floats((last - first) * size)
    adjoint[:] = ends[at : at + adjoint.size]
    for tile in range(end - 1, begin - 1, -1):
        start = plan.offset + tile * TILE
        count = min(TILE, plan.offset + plan.rows - start)
        list_tokens(plan, start, count, tokens)
        take_rows(plan, case, first, last, count, tokens, grad_y, rows)
        sums[:] = 0.0
        for block in range(first, last):
            if block > first and block % plan.blocks_per_matrix == 0:
                sum_channels(plan, case, group, block - 1, start, count, sums, partial)
                sums[:] = 0.0
            at = case * plan.all_tiles + plan.offset // TILE + tile
            at = (at * plan.blocks + block) * size
            fill_steps(plan, case, block, start, count, code, weight, bias, dt, slope)
            replay_tile(
                plan,
                case,
                block,
                start,
                count,
                u,
                dt,
                rates,
                matrix_b,
                kept[at : at + size],
                decays,
                history,
            )
            local = (block - first) * size
            return_tile(
                plan,
                case,
                block,
                start,
                count,
                u,
                dt,
                rates,
                matrix_b,
                matrix_c,
                skip,
                decays,
                history,
                rows[(block - first) * LANES :],
                lane,
                adjoint[local : local + size],
                of_rates[block * size : (block + 1) * size],
                of_skip,
                grad_u,
                grad_dt,
                sums,
            )
            if plan.rank > 0:
                return_steps(
                    plan,
                    case,
                    block,
                    start,
                    count,
                    code,
                    weight,
                    slope,
                    grad_dt,
                    of_weight,
                    of_bias,
                    sums,
                )
            else:
                for t in range(count):
                    row = case * plan.pitch + start - plan.offset + t
                    store(
                        grad_steps,
                        row * width + block * LANES,
                        load(grad_dt, t * LANES),
                    )
        sum_channels(plan, case, group, last - 1, start, count, sums, partial)
    if begin == 0:
        at = (case * plan.blocks + first) * size
        before[at : at + adjoint.size] = adjoint
