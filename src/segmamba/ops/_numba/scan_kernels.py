"""Kernels of the selective scan for one task: some channels of some rows.

Within a tile, states are [N][16 channels]. The formulas are in
`docs/concepts/selective-scan.md`; layouts are in `plan.py`.
"""

from __future__ import annotations

import numpy as np

from segmamba.ops._layout import LANES, STATES, TILE
from segmamba.ops._numba.rows import floats, list_tokens
from segmamba.ops._numba.tasks import kernel
from segmamba.ops._numba.vectors import (
    add,
    exp2,
    fma,
    fold,
    load,
    load_wide,
    mul,
    sigmoid,
    softplus,
    splat,
    splat_wide,
    store,
    widen,
    zeros,
)


@kernel
def split_task(plan, task):
    """Case, first and last block, first and last tile, group and segment of a task."""
    group = task % plan.groups
    rest = task // plan.groups
    segment = rest % plan.segments
    case = rest // plan.segments
    first = group * plan.blocks // plan.groups
    last = (group + 1) * plan.blocks // plan.groups
    begin = segment * plan.tiles // plan.segments
    end = (segment + 1) * plan.tiles // plan.segments
    return case, first, last, begin, end, group, segment


@kernel
def fill_steps(plan, case, block, start, count, code, weight, bias, dt, slope):
    """Write step sizes of a tile's block, and the slope of softplus if asked for.

    Without rank, `code` holds the step sizes themselves.
    """
    width = plan.blocks * LANES
    column = block * LANES
    for t in range(count):
        row = case * plan.pitch + start - plan.offset + t
        if plan.rank == 0:
            store(dt, t * LANES, load(code, row * width + column))
            continue
        value = load(bias, column)
        for q in range(plan.rank):
            part = splat(code[row * plan.width + q])
            value = fma(part, load(weight, q * width + column), value)
        store(dt, t * LANES, softplus(value))
        if slope.size > 0:
            store(slope, t * LANES, sigmoid(value))


@kernel
def scan_tile(
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
    state,
    y,
    lane,
):
    """Walk a tile's block; write y rows, `lane` floats apart, from y's start on."""
    width = plan.blocks * LANES
    column = block * LANES
    shared = block // plan.blocks_per_matrix * plan.states
    for t in range(count):
        row = case * plan.pitch + start - plan.offset + t
        step = load(dt, t * LANES)
        value = load(u, row * width + column)
        steps, drive = widen(step), widen(mul(step, value))
        b_row = row * plan.width + plan.b_first + shared
        c_row = row * plan.width + plan.c_first + shared
        result = widen(zeros())
        for n in range(0, plan.states, STATES):
            rate = load_wide(rates, (block * plan.states + n) * LANES)
            decayed = mul(exp2(mul(steps, rate)), load_wide(state, n * LANES))
            now = fma(drive, splat_wide(matrix_b, b_row + n), decayed)
            store(state, n * LANES, now)
            result = fma(now, splat_wide(matrix_c, c_row + n), result)
        store(y, t * lane, fma(value, load(skip, column), fold(result)))


@kernel
def walk_tile(plan, case, block, start, count, u, dt, rates, matrix_b, state):
    """Walk a tile's block for its last state only."""
    width = plan.blocks * LANES
    shared = block // plan.blocks_per_matrix * plan.states
    for t in range(count):
        row = case * plan.pitch + start - plan.offset + t
        step = load(dt, t * LANES)
        value = load(u, row * width + block * LANES)
        steps, drive = widen(step), widen(mul(step, value))
        b_row = row * plan.width + plan.b_first + shared
        for n in range(0, plan.states, STATES):
            rate = load_wide(rates, (block * plan.states + n) * LANES)
            decayed = mul(exp2(mul(steps, rate)), load_wide(state, n * LANES))
            now = fma(drive, splat_wide(matrix_b, b_row + n), decayed)
            store(state, n * LANES, now)


@kernel
def copy_state(plan, source, source_at, target, target_at):
    """Copy one block's state."""
    for n in range(plan.states):
        store(target, target_at + n * LANES, load(source, source_at + n * LANES))


@kernel
def add_rows(plan, case, first, last, count, tokens, y, out, accumulate):
    """Put a tile's rows into token order, or add them to what is there."""
    width = plan.blocks * LANES
    lane = (last - first) * LANES
    for t in range(count):
        place = (case * plan.length + tokens[t]) * width + first * LANES
        for i in range(0, lane, LANES):
            value = load(y, t * lane + i)
            if accumulate:
                value = add(value, load(out, place + i))
            store(out, place + i, value)


@kernel
def scan_segment_ends(task, plan, u, code, weight, bias, rates, matrix_b, ends, sums):
    """First walk of a segment, from a zero state: its last state and sum of dt."""
    case, first, last, begin, end, _, segment = split_task(plan, task)
    size = plan.states * LANES
    dt = floats(TILE * LANES)
    no_slope = np.empty(0, np.float32)
    state = floats(size)
    for block in range(first, last):
        place = (case * plan.segments + segment) * plan.blocks + block
        state[:] = 0.0
        passed = zeros()
        for tile in range(begin, end):
            start = plan.offset + tile * TILE
            count = min(TILE, plan.offset + plan.rows - start)
            fill_steps(
                plan, case, block, start, count, code, weight, bias, dt, no_slope
            )
            walk_tile(plan, case, block, start, count, u, dt, rates, matrix_b, state)
            for t in range(count):
                passed = add(passed, load(dt, t * LANES))
        copy_state(plan, state, 0, ends, place * size)
        store(sums, place * LANES, passed)


@kernel
def scan_forward(
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
    starts,
    kept,
    last_state,
    out,
    accumulate,
):
    """Scan a segment from its start states; keep tiles' start states if asked for."""
    case, first, last, begin, end, _, segment = split_task(plan, task)
    size = plan.states * LANES
    lane = (last - first) * LANES
    dt = floats(TILE * LANES)
    no_slope = np.empty(0, np.float32)
    y = floats(TILE * lane)
    tokens = np.empty(TILE, np.int64)
    state = floats((last - first) * size)
    place = (case * plan.segments + segment) * plan.blocks + first
    state[:] = starts[place * size : place * size + state.size]
    for tile in range(begin, end):
        start = plan.offset + tile * TILE
        count = min(TILE, plan.offset + plan.rows - start)
        if kept.size > 0:
            at = plan.offset // TILE + tile
            place = ((case * plan.all_tiles + at) * plan.blocks + first) * size
            kept[place : place + state.size] = state
        for block in range(first, last):
            fill_steps(
                plan, case, block, start, count, code, weight, bias, dt, no_slope
            )
            scan_tile(
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
                state[(block - first) * size : (block - first + 1) * size],
                y[(block - first) * LANES :],
                lane,
            )
        list_tokens(plan, start, count, tokens)
        add_rows(plan, case, first, last, count, tokens, y, out, accumulate)
    if end == plan.tiles:
        place = (case * plan.blocks + first) * size
        last_state[place : place + state.size] = state
