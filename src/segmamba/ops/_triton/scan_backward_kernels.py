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
    token_of,
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
    grad_base = (row_of % grad_rows).to(tl.int64) * L
    lanes = tl.zeros([BE], tl.int64) + group * N
    end = min(chunk * T + T, L)
    inside, run, step = walk_from(end - 1, stride, reverse, L)
    for back in range(0, end - chunk * T):
        row = base + end - 1 - back
        dt = step_size(
            code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
        )
        token = grad_base + inside * (L // stride) + run
        grad = tl.load(grad_ptr + token * E + channels, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        C = load_states(c_ptr + row * c_stride + lanes, N, ASM)
        before = ()
        for n in tl.static_range(N):
            now = adjoint[n] + grad * C[n]
            before = before + (now * tl.exp2(rates[n] * dt),)
        adjoint = before
        inside, run = walk_on(inside, run, -step, stride)
    slot = row_of.to(tl.int64) * (chunks + 1) + chunk - 1
    for n in tl.static_range(N):
        tl.store(
            adjoints_ptr + (slot * (N + 1) + n) * E + channels, adjoint[n], mask=mask
        )


@triton.jit
def load_square(pointer, stride, NT: tl.constexpr, ASM: tl.constexpr):
    """NT rows of four neighbours for each pointer: states by channels of a thread."""
    values = ()
    for nt in tl.static_range(NT):
        a, b, c, d = load_four(pointer + nt * stride, ASM)
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
def add_four(pointers, a, b, c, d, fresh, valid, ASM: tl.constexpr):
    """Add to four neighbours in memory, or write them where `fresh`."""
    e, f, g, h = load_four(pointers, ASM)
    a += tl.where(fresh, 0.0, e)
    b += tl.where(fresh, 0.0, f)
    c += tl.where(fresh, 0.0, g)
    d += tl.where(fresh, 0.0, h)
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
    base,
    first,
    channels,
    mask,
    lanes,
    L,
    E,
    code_stride,
    b_stride,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    S: tl.constexpr,
    ASM: tl.constexpr,
):
    """Walk a chunk; leave the state before every S-th step, and all step sizes.

    Scratch is (T / S, N, 32) states, then (T, 32) step sizes, zero beyond the end.
    """
    steps_ptr = scratch_ptr + (T // S) * N * BE
    inner = tl.arange(0, BE)
    for part in range(0, T // S):
        for n in tl.static_range(N):
            tl.store(scratch_ptr + (part * N + n) * BE + inner, state[n])
        for i in tl.static_range(S):
            t = first + part * S + i
            here = mask & (t < L)
            row = base + tl.minimum(t, L - 1)
            u = tl.load(u_ptr + row * E + channels, mask=here, other=0.0)
            dt = step_size(
                code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
            )
            dt = tl.where(here, dt, 0.0)
            tl.store(steps_ptr + (part * S + i) * BE + inner, dt)
            B = load_states(b_ptr + row * b_stride + lanes, N, ASM)
            drive = dt * u.to(tl.float32)
            after = ()
            for n in tl.static_range(N):
                after = after + (state[n] * tl.exp2(rates[n] * dt) + drive * B[n],)
            state = after


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
    ASM: tl.constexpr,
):
    """All gradients, chunk by chunk, from true first states and true last adjoints.

    Program (p, s, row): chunks p, p + P, ... of a row of sequences; the s-th part of a
    group's `blocks` blocks of channels. Writes gradients of u and of the step sizes
    before softplus (or of the step sizes themselves), those of B and C summed over the
    channels of the part, and, for each p, the sums for A (in units of its base-2 form
    over ln 2) and D in (P, rows, N + 1, E).
    """
    NT: tl.constexpr = N // 4
    row_of = tl.program_id(2)
    direction = row_of // batch
    group, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    each = tl.cdiv(blocks, splits)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    program = program * tl.num_programs(0) + tl.program_id(0)
    scratch_ptr += program * ((T // S) * N * BE + T * BE + T * 2 * N)
    steps_ptr = scratch_ptr + (T // S) * N * BE
    bc_ptr = steps_ptr + T * BE
    base = row_of.to(tl.int64) * L
    grad_base = (row_of % grad_rows).to(tl.int64) * L
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    lane = tl.arange(0, 8)[None, :] + tl.zeros([4, 1], tl.int32)
    states = tl.arange(0, 4)[:, None] * NT + tl.zeros([1, 8], tl.int32)
    lanes = tl.zeros([BE], tl.int64) + group * N
    square_lanes = (states + group * N).to(tl.int64)
    sums_ptr = partial_ptr + (
        tl.program_id(0).to(tl.int64) * tl.num_programs(2) + row_of
    ) * ((N + 1) * E)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        slot = row_of.to(tl.int64) * (chunks + 1) + chunk
        for block in range(split * each, min(split * each + each, blocks)):
            inner = block * BE + tl.arange(0, BE)
            channels = group * per_group + inner
            mask = inner < per_group
            rates = load_channel(a_ptr + direction * N * E, channels, mask, E, N)
            weights, bias = load_weights(
                weight_ptr, bias_ptr, direction, channels, mask, E, RANK
            )
            state = load_channel(kept_ptr + slot * (N + 1) * E, channels, mask, E, N)
            tl.debug_barrier()
            leave_states(
                u_ptr,
                code_ptr,
                b_ptr,
                rates,
                weights,
                bias,
                state,
                scratch_ptr,
                base,
                chunk * T,
                channels,
                mask,
                lanes,
                L,
                E,
                code_stride,
                b_stride,
                T,
                N,
                RANK,
                S,
                ASM,
            )
            tl.debug_barrier()
            inside = block * BE + 4 * lane < per_group
            column = group * per_group + tl.where(inside, block * BE + 4 * lane, 0)
            corner = states * E + column
            squares = load_square(a_ptr + direction * N * E + corner, E, NT, ASM)
            adjoint = load_square(
                adjoints_ptr + slot * (N + 1) * E + corner, E, NT, ASM
            )
            skip = load_four(skip_ptr + direction * E + column, ASM)
            of_rates = zero_squares(NT * 4)
            of_skip = zero_squares(4)
            for back in range(0, T // S):
                part = T // S - 1 - back
                history = load_square(
                    scratch_ptr + (part * N + states) * BE + 4 * lane, BE, NT, ASM
                )
                decays = ()
                steps = ()
                inputs = ()
                for i in tl.static_range(S):
                    t = chunk * T + part * S + i
                    row = base + tl.minimum(t, L - 1)
                    B = load_states(b_ptr + row * b_stride + square_lanes, NT, ASM)
                    u = load_four(u_ptr + row * E + column, ASM)
                    dt = load_four(steps_ptr + (part * S + i) * BE + 4 * lane, ASM)
                    steps = steps + dt
                    inputs = inputs + u
                    for nt in tl.static_range(NT):
                        for ct in tl.static_range(4):
                            decay = tl.exp2(squares[nt * 4 + ct] * dt[ct])
                            old = history[(i * NT + nt) * 4 + ct]
                            now = old * decay + dt[ct] * u[ct] * B[nt]
                            decays = decays + (decay,)
                            history = history + (now,)
                for i in tl.static_range(S - 1, -1, -1):
                    t = chunk * T + part * S + i
                    row = base + tl.minimum(t, L - 1)
                    B = load_states(b_ptr + row * b_stride + square_lanes, NT, ASM)
                    C = load_states(c_ptr + row * c_stride + square_lanes, NT, ASM)
                    token = token_of(tl.minimum(t, L - 1), stride, reverse, L)
                    token = grad_base + token
                    loaded = load_four(grad_ptr + token * E + column, ASM)
                    arrived = ()
                    for ct in tl.static_range(4):
                        arrived = arrived + (tl.where(t < L, loaded[ct], 0.0),)
                    drive = zero_squares(4)
                    exponent = zero_squares(4)
                    before = ()
                    rates_sum = ()
                    shared = ()
                    for nt in tl.static_range(NT):
                        of_b = tl.zeros([4, 8], tl.float32)
                        of_c = tl.zeros([4, 8], tl.float32)
                        new_drive = ()
                        new_exponent = ()
                        for ct in tl.static_range(4):
                            dt = steps[i * 4 + ct]
                            now = adjoint[nt * 4 + ct] + arrived[ct] * C[nt]
                            of_b += now * (dt * inputs[i * 4 + ct])
                            of_c += arrived[ct] * history[((i + 1) * NT + nt) * 4 + ct]
                            new_drive = new_drive + (drive[ct] + now * B[nt],)
                            passed = now * decays[(i * NT + nt) * 4 + ct]
                            moved = passed * history[(i * NT + nt) * 4 + ct]
                            new_exponent = new_exponent + (
                                exponent[ct] + moved * squares[nt * 4 + ct],
                            )
                            before = before + (passed,)
                            rates_sum = rates_sum + (
                                of_rates[nt * 4 + ct] + moved * dt,
                            )
                        drive = new_drive
                        exponent = new_exponent
                        shared = shared + (total_of_lanes(of_b), total_of_lanes(of_c))
                    adjoint = before
                    of_rates = rates_sum
                    kept = bc_ptr + (part * S + i) * 2 * N + states
                    target = grad_bc_ptr + group * N + states
                    target += (split * bc_rows + row) * bc_stride
                    one = (lane == 0) & (t < L)
                    first = block == split * each
                    last = block + 1 == min(split * each + each, blocks)
                    for nt in tl.static_range(0, NT, 4):
                        for m in tl.static_range(2):
                            before_ = load_four(kept + m * N + nt, ASM)
                            total = ()
                            for k in tl.static_range(4):
                                old = tl.where(first, 0.0, before_[k])
                                total = total + (shared[2 * (nt + k) + m] + old,)
                            store_four(
                                kept + m * N + nt,
                                total[0],
                                total[1],
                                total[2],
                                total[3],
                                (lane == 0) & (not last),
                                ASM,
                            )
                            store_four(
                                target + m * c_column + nt,
                                total[0],
                                total[1],
                                total[2],
                                total[3],
                                one & last,
                                ASM,
                            )
                    of_u = ()
                    of_step = ()
                    skip_sum = ()
                    for ct in tl.static_range(4):
                        dt = steps[i * 4 + ct]
                        u = inputs[i * 4 + ct]
                        through = total_of_states(drive[ct])
                        turned = total_of_states(exponent[ct])
                        of_u = of_u + (arrived[ct] * skip[ct] + through * dt,)
                        slope = through * u + turned * LN2
                        if RANK > 0:
                            slope *= 1.0 - tl.exp2(-dt * LOG2E)
                        of_step = of_step + (slope,)
                        skip_sum = skip_sum + (of_skip[ct] + arrived[ct] * u,)
                    of_skip = skip_sum
                    one = (states == 0) & inside & (t < L)
                    place = row * E + column
                    store_four(
                        grad_u_ptr + place, of_u[0], of_u[1], of_u[2], of_u[3], one, ASM
                    )
                    store_four(
                        grad_step_ptr + place,
                        of_step[0],
                        of_step[1],
                        of_step[2],
                        of_step[3],
                        one,
                        ASM,
                    )
            fresh = chunk == tl.program_id(0)
            for nt in tl.static_range(NT):
                add_four(
                    sums_ptr + corner + nt * E,
                    of_rates[nt * 4],
                    of_rates[nt * 4 + 1],
                    of_rates[nt * 4 + 2],
                    of_rates[nt * 4 + 3],
                    fresh,
                    inside,
                    ASM,
                )
            add_four(
                sums_ptr + N * E + column,
                of_skip[0],
                of_skip[1],
                of_skip[2],
                of_skip[3],
                fresh,
                inside & (states == 0),
                ASM,
            )
