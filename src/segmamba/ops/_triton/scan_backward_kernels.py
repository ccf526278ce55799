"""Kernels of the scan's gradients: adjoints of chunks from zero, then everything.

The second kernel works in two ways on the same chunk. First a thread holds a channel,
as in the forward, walks the chunk and leaves step sizes and every S-th state in its
program's scratch memory. Then the 32 threads are 4 along states by 8 along channels,
each with N/4 states of 4 channels, so that few shuffles sum over channels (for B, C)
and over states (for u, dt): S steps are replayed, kept in registers and walked back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segmamba.ops._triton.loads import (
    LN2,
    LOG2E,
    load_four,
    load_states,
    store_four,
    walk_from,
    walk_on,
)
from segmamba.ops._triton.scan_kernels import (
    channels_of,
    load_channel,
    load_weights,
    step_size,
)

BE = tl.constexpr(32)
"""Channels of a program: its threads."""


@triton.jit
def adjoint_chunks(
    grad_ptr,
    code_ptr,
    c_ptr,
    a_ptr,
    weight_ptr,
    bias_ptr,
    orders_ptr,
    adjoints_ptr,
    L,
    E,
    per_group,
    batch,
    chunks,
    grad_rows,
    code_stride,
    c_stride,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write the adjoint with which each chunk but the first begins, from a zero end.

    It goes to slot chunk - 1, where the carry wants it. grad is by token, of
    `grad_rows` rows of sequences: one for each case, or one for each direction too.
    """
    chunk, row_of = tl.program_id(0) + 1, tl.program_id(2)
    direction = row_of // batch
    group, channels, mask = channels_of(tl.program_id(1), per_group, BE)
    rates = load_channel(a_ptr + direction * N * E, channels, mask, E, N)
    weights, bias = load_weights(
        weight_ptr, bias_ptr, direction, channels, mask, E, RANK
    )
    adjoint = ()
    for _ in tl.static_range(N):
        adjoint = adjoint + (tl.zeros([BE], tl.float32),)
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    base = row_of.to(tl.int64) * L
    grad_ptr += (row_of % grad_rows).to(tl.int64) * L * E
    lanes = tl.zeros([BE], tl.int64) + group * N
    end = min(chunk * T + T, L)
    position, run, step = walk_from(end - 1, stride, reverse, L)
    for back in range(0, end - chunk * T):
        row = base + end - 1 - back
        dt = step_size(
            code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
        )
        token = (position * (L // stride) + run).to(tl.int64)
        grad = tl.load(grad_ptr + token * E + channels, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        C = load_states(c_ptr + row * c_stride + lanes, N, ASM)
        before = ()
        for n in tl.static_range(N):
            now = adjoint[n] + grad * C[n]
            before = before + (now * tl.exp2(rates[n] * dt),)
        adjoint = before
        position, run = walk_on(position, run, -step, stride)
    slot = row_of.to(tl.int64) * (chunks + 1) + chunk - 1
    for n in tl.static_range(N):
        tl.store(
            adjoints_ptr + (slot * (N + 1) + n) * E + channels, adjoint[n], mask=mask
        )


@triton.jit
def load_square(
    pointer, stride, NT: tl.constexpr, ASM: tl.constexpr, OWN: tl.constexpr = False
):
    """NT rows of four neighbours for each pointer: states by channels of a thread."""
    values = ()
    for nt in tl.static_range(NT):
        a, b, c, d = load_four(pointer + nt * stride, ASM, OWN)
        values = values + (a, b, c, d)
    return values


@triton.jit
def zero_squares(COUNT: tl.constexpr):
    """COUNT zero [4, 8] tensors."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros([4, 8], tl.float32),)
    return values


@triton.jit
def total_of_lanes(x):
    """Sum over a thread's neighbours along channels, known to all of them."""
    return tl.sum(x, 1)[:, None] + tl.zeros([4, 8], tl.float32)


@triton.jit
def total_of_states(x):
    """Sum over a thread's neighbours along states, known to all of them."""
    return tl.sum(x, 0)[None, :] + tl.zeros([4, 8], tl.float32)


@triton.jit
def add_four(pointers, values, fresh, valid, ASM: tl.constexpr):
    """Add to four neighbours in memory, or write them where `fresh`."""
    a, b, c, d = load_four(pointers, ASM, True)
    a = values[0] + tl.where(fresh, 0.0, a)
    b = values[1] + tl.where(fresh, 0.0, b)
    c = values[2] + tl.where(fresh, 0.0, c)
    d = values[3] + tl.where(fresh, 0.0, d)
    store_four(pointers, a, b, c, d, valid, ASM)


@triton.jit
def leave_states(
    u_ptr,
    code_ptr,
    b_ptr,
    rates,
    weights,
    bias,
    state,
    scratch_ptr,
    channels,
    mask,
    last,
    E,
    code_stride,
    b_stride,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    ASM: tl.constexpr,
):
    """Walk a chunk; leave the state before every S-th step, and all step sizes.

    Pointers are those of the chunk's first row; `last` is its last row that exists.
    U steps, a multiple of S, are loaded at a time. Scratch is (T / S, N, 32) states,
    then (T, 32) step sizes, zero beyond the end.
    """
    steps_ptr = scratch_ptr + (T // S) * N * BE
    inner = tl.arange(0, BE)
    for part in range(0, T // U):
        values = ()
        steps = ()
        B = ()
        for i in tl.static_range(U):
            row = tl.minimum(part * U + i, last)
            u = tl.load(u_ptr + row * E + channels, mask=mask, other=0.0)
            values = values + (u.to(tl.float32),)
            dt = step_size(
                code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
            )
            steps = steps + (tl.where(mask & (part * U + i <= last), dt, 0.0),)
            B = B + load_states(b_ptr + row * b_stride, N, ASM)
        for i in tl.static_range(U):
            if i % S == 0:
                place = scratch_ptr + (part * (U // S) + i // S) * N * BE + inner
                for n in tl.static_range(N):
                    tl.store(place + n * BE, state[n])
            tl.store(steps_ptr + (part * U + i) * BE + inner, steps[i])
            drive = steps[i] * values[i]
            after = ()
            for n in tl.static_range(N):
                decay = tl.exp2(rates[n] * steps[i])
                after = after + (state[n] * decay + drive * B[i * N + n],)
            state = after


@triton.jit
def replay(history, steps, inputs, B, rates, S: tl.constexpr, NT: tl.constexpr):
    """States after each of S steps, behind the first ones, and the steps' decays."""
    decays = ()
    for i in tl.static_range(S):
        for nt in tl.static_range(NT):
            for ct in tl.static_range(4):
                decay = tl.exp2(rates[nt * 4 + ct] * steps[i * 4 + ct])
                drive = steps[i * 4 + ct] * inputs[i * 4 + ct]
                old = history[(i * NT + nt) * 4 + ct]
                decays = decays + (decay,)
                history = history + (old * decay + drive * B[i * NT + nt],)
    return history, decays


@triton.jit
def return_step(
    adjoint,
    of_rates,
    history,
    decays,
    steps,
    inputs,
    arrived,
    B,
    C,
    rates,
    i: tl.constexpr,
    NT: tl.constexpr,
):
    """Walk one step back.

    Gives the adjoint before it, the sums for the rates, and this thread's parts of the
    gradients of B and C (in pairs), of u's share of the drive, and of the exponent.
    """
    drive = zero_squares(4)
    exponent = zero_squares(4)
    before = ()
    sums = ()
    shared = ()
    for nt in tl.static_range(NT):
        of_b = tl.zeros([4, 8], tl.float32)
        of_c = tl.zeros([4, 8], tl.float32)
        new_drive = ()
        new_exponent = ()
        for ct in tl.static_range(4):
            dt = steps[i * 4 + ct]
            now = adjoint[nt * 4 + ct] + arrived[i * 4 + ct] * C[i * NT + nt]
            of_b += now * (dt * inputs[i * 4 + ct])
            of_c += arrived[i * 4 + ct] * history[((i + 1) * NT + nt) * 4 + ct]
            new_drive = new_drive + (drive[ct] + now * B[i * NT + nt],)
            passed = now * decays[(i * NT + nt) * 4 + ct]
            moved = passed * history[(i * NT + nt) * 4 + ct]
            new_exponent = new_exponent + (exponent[ct] + moved * rates[nt * 4 + ct],)
            before = before + (passed,)
            sums = sums + (of_rates[nt * 4 + ct] + moved * dt,)
        drive = new_drive
        exponent = new_exponent
        shared = shared + (of_b, of_c)
    return before, sums, shared, drive, exponent


@triton.jit
def store_shared(
    kept,
    target,
    c_column,
    shared,
    first,
    last,
    leader,
    valid,
    N: tl.constexpr,
    NT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sum gradients of B and C over the channels of all blocks, one block at a time.

    Sums so far are `kept`; those of the last block go to their target.
    """
    for nt in tl.static_range(0, NT, 4):
        for m in tl.static_range(2):
            old = load_four(kept + m * N + nt, ASM, True)
            total = ()
            for k in tl.static_range(4):
                part = total_of_lanes(shared[2 * (nt + k) + m])
                total = total + (part + tl.where(first, 0.0, old[k]),)
            store_four(
                kept + m * N + nt,
                total[0],
                total[1],
                total[2],
                total[3],
                leader & (not last),
                ASM,
            )
            store_four(
                target + m * c_column + nt,
                total[0],
                total[1],
                total[2],
                total[3],
                leader & last & valid,
                ASM,
            )


@triton.jit
def scan_gradients(
    grad_ptr,
    u_ptr,
    code_ptr,
    b_ptr,
    c_ptr,
    a_ptr,
    weight_ptr,
    bias_ptr,
    skip_ptr,
    orders_ptr,
    kept_ptr,
    adjoints_ptr,
    scratch_ptr,
    grad_u_ptr,
    grad_step_ptr,
    grad_bc_ptr,
    partial_ptr,
    L,
    E,
    per_group,
    batch,
    chunks,
    grad_rows,
    code_stride,
    b_stride,
    c_stride,
    bc_stride,
    bc_rows,
    c_column,
    blocks,
    splits,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
    ASM: tl.constexpr,
):
    """All gradients, chunk by chunk, from true first states and true last adjoints.

    Program (p, s, row): chunks p, p + P, ... of a row of sequences; the s-th part of a
    group's `blocks` blocks of channels. Writes gradients of u and of the step sizes
    before softplus (or of the step sizes themselves), those of B and C summed over the
    channels of the part, and, for each p, (P, rows, N + 2, E) sums: for A, for D, and
    of the step sizes' gradients.
    """
    NT: tl.constexpr = N // 4
    row_of = tl.program_id(2)
    direction = row_of // batch
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    each = tl.cdiv(blocks, splits)
    first_block = split * each
    end_block = min(first_block + each, blocks)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    program = program * tl.num_programs(0) + tl.program_id(0)
    scratch_ptr += program * ((T // S) * N * BE + T * BE + T * 2 * N)
    steps_ptr = scratch_ptr + (T // S) * N * BE
    bc_ptr = steps_ptr + T * BE
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    lane = tl.arange(0, 8)[None, :] + tl.zeros([4, 1], tl.int32)
    states = tl.arange(0, 4)[:, None] * NT + tl.zeros([1, 8], tl.int32)
    everyone = tl.zeros([BE], tl.int64)
    square = (states + group * N).to(tl.int64)
    sums_ptr = partial_ptr + (
        tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row_of
    ) * ((N + 2) * E)
    a_ptr += direction * N * E
    grad_ptr += (row_of % grad_rows).to(tl.int64) * L * E
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        slot = (row_of.to(tl.int64) * (chunks + 1) + chunk) * (N + 1) * E
        base = row_of.to(tl.int64) * L + chunk * T
        last_row = min(T, L - chunk * T) - 1
        for block in range(first_block, end_block):
            inner = block * BE + tl.arange(0, BE)
            channels = group * per_group + inner
            mask = inner < per_group
            rates = load_channel(a_ptr, channels, mask, E, N)
            weights, bias = load_weights(
                weight_ptr, bias_ptr, direction, channels, mask, E, RANK
            )
            state = load_channel(kept_ptr + slot, channels, mask, E, N)
            tl.debug_barrier()
            leave_states(
                u_ptr + base * E,
                code_ptr + base * code_stride,
                b_ptr + base * b_stride + group * N + everyone,
                rates,
                weights,
                bias,
                state,
                scratch_ptr,
                channels,
                mask,
                last_row,
                E,
                code_stride,
                b_stride,
                T,
                N,
                RANK,
                S,
                U,
                ASM,
            )
            tl.debug_barrier()
            inside = block * BE + 4 * lane < per_group
            column = group * per_group + tl.where(inside, block * BE + 4 * lane, 0)
            corner = states * E + column
            squares = load_square(a_ptr + corner, E, NT, ASM)
            adjoint = load_square(adjoints_ptr + slot + corner, E, NT, ASM)
            skip = load_four(skip_ptr + direction * E + column, ASM)
            of_rates = zero_squares(NT * 4)
            of_skip = zero_squares(4)
            of_bias = zero_squares(4)
            u_row = u_ptr + base * E + column
            grad_u_row = grad_u_ptr + base * E + column
            grad_step_row = grad_step_ptr + base * E + column
            b_row = b_ptr + base * b_stride + square
            c_row = c_ptr + base * c_stride + square
            bc_row = grad_bc_ptr + (split * bc_rows + base) * bc_stride + square
            grad_row = grad_ptr + column
            position, run, step = walk_from(chunk * T + last_row, stride, reverse, L)
            for back in range(0, T // S):
                part = T // S - 1 - back
                history = load_square(
                    scratch_ptr + (part * N + states) * BE + 4 * lane, BE, NT, ASM, True
                )
                steps = ()
                inputs = ()
                B = ()
                C = ()
                for i in tl.static_range(S):
                    row = tl.minimum(part * S + i, last_row)
                    inputs = inputs + load_four(u_row + row * E, ASM)
                    steps = steps + load_four(
                        steps_ptr + (part * S + i) * BE + 4 * lane, ASM, True
                    )
                    B = B + load_states(b_row + row * b_stride, NT, ASM)
                    C = C + load_states(c_row + row * c_stride, NT, ASM)
                arrived = ()
                for i in tl.static_range(S - 1, -1, -1):
                    exists = part * S + i <= last_row
                    token = (position * (L // stride) + run).to(tl.int64)
                    loaded = load_four(grad_row + token * E, ASM)
                    masked = ()
                    for ct in tl.static_range(4):
                        masked = masked + (tl.where(exists, loaded[ct], 0.0),)
                    arrived = masked + arrived
                    next_position, next_run = walk_on(position, run, -step, stride)
                    position = tl.where(exists, next_position, position)
                    run = tl.where(exists, next_run, run)
                history, decays = replay(history, steps, inputs, B, squares, S, NT)
                for i in tl.static_range(S - 1, -1, -1):
                    adjoint, of_rates, shared, drive, exponent = return_step(
                        adjoint,
                        of_rates,
                        history,
                        decays,
                        steps,
                        inputs,
                        arrived,
                        B,
                        C,
                        squares,
                        i,
                        NT,
                    )
                    row = part * S + i
                    exists = row <= last_row
                    store_shared(
                        bc_ptr + row * 2 * N + states,
                        bc_row + tl.minimum(row, last_row) * bc_stride,
                        c_column,
                        shared,
                        block == first_block,
                        block + 1 == end_block,
                        lane == 0,
                        exists,
                        N,
                        NT,
                        ASM,
                    )
                    of_u = ()
                    of_step = ()
                    skip_sum = ()
                    bias_sum = ()
                    for ct in tl.static_range(4):
                        dt = steps[i * 4 + ct]
                        u = inputs[i * 4 + ct]
                        grad = arrived[i * 4 + ct]
                        through = total_of_states(drive[ct])
                        slope = through * u + total_of_states(exponent[ct]) * LN2
                        if RANK > 0:
                            slope *= 1.0 - tl.exp2(-dt * LOG2E)
                        of_u = of_u + (grad * skip[ct] + through * dt,)
                        of_step = of_step + (slope,)
                        skip_sum = skip_sum + (of_skip[ct] + grad * u,)
                        bias_sum = bias_sum + (of_bias[ct] + slope,)
                    of_skip = skip_sum
                    of_bias = bias_sum
                    one = (states == 0) & inside & exists
                    store_four(
                        grad_u_row + row * E,
                        of_u[0],
                        of_u[1],
                        of_u[2],
                        of_u[3],
                        one,
                        ASM,
                    )
                    store_four(
                        grad_step_row + row * E,
                        of_step[0],
                        of_step[1],
                        of_step[2],
                        of_step[3],
                        one,
                        ASM,
                    )
            fresh = chunk == tl.program_id(0)
            for nt in tl.static_range(NT):
                values = ()
                for ct in tl.static_range(4):
                    values = values + (of_rates[nt * 4 + ct],)
                add_four(sums_ptr + corner + nt * E, values, fresh, inside, ASM)
            one = inside & (states == 0)
            add_four(sums_ptr + N * E + column, of_skip, fresh, one, ASM)
            add_four(sums_ptr + (N + 1) * E + column, of_bias, fresh, one, ASM)
