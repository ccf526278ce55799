"""Kernels of the scan's forward: chunks from a zero state, the carry, the outputs.

A program is one chunk of T steps, BE channels of a group, one row of sequences
(direction times batch). A thread holds a channel; its states are a tuple of N values.
Rows of u, of the step sizes' code and of B and C are by position; rows of y by token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segmamba.ops._triton.loads import load_states, softplus, walk_from, walk_on


@triton.jit
def channels_of(block, per_group, BE: tl.constexpr):
    """(group, channels, mask) of a block: blocks don't cross groups."""
    blocks = tl.cdiv(per_group, BE)
    inside = block % blocks * BE + tl.arange(0, BE)
    group = block // blocks
    return group, group * per_group + inside, inside < per_group


@triton.jit
def load_channel(pointer, channels, mask, E, COUNT: tl.constexpr):
    """A tuple of COUNT rows of a (COUNT, E) array, at some channels."""
    values = ()
    for i in tl.static_range(COUNT):
        row = tl.load(pointer + i * E + channels, mask=mask, other=0.0)
        values = values + (row.to(tl.float32),)
    return values


@triton.jit
def load_weights(
    weight_ptr, bias_ptr, direction, channels, mask, E, RANK: tl.constexpr
):
    """Weights of the step sizes' code, (K, E, RANK), and biases, (K, E)."""
    weights = ()
    bias = tl.zeros(channels.shape, tl.float32)
    for q in tl.static_range(RANK):
        pointers = weight_ptr + (direction * E + channels) * RANK + q
        weights = weights + (tl.load(pointers, mask=mask, other=0.0),)
    if RANK > 0:
        bias = tl.load(bias_ptr + direction * E + channels, mask=mask, other=0.0)
    return weights, bias


@triton.jit
def step_size(
    code_ptr,
    row,
    stride,
    weights,
    bias,
    channels,
    mask,
    RANK: tl.constexpr,
    ASM: tl.constexpr,
):
    """The step size at a row: given, or from its code."""
    if RANK == 0:
        given = tl.load(code_ptr + row * stride + channels, mask=mask, other=0.0)
        return given.to(tl.float32)
    raw = bias
    for q in tl.static_range(RANK):
        raw += weights[q] * tl.load(code_ptr + row * stride + q).to(tl.float32)
    return softplus(raw, ASM)


@triton.jit
def scan_chunks(
    u_ptr,
    code_ptr,
    b_ptr,
    a_ptr,
    weight_ptr,
    bias_ptr,
    kept_ptr,
    L,
    E,
    per_group,
    batch,
    chunks,
    code_stride,
    b_stride,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write each chunk's last state from a zero one, and its sum of step sizes.

    Kept is (rows, chunks + 1, N + 1, E), states and then the sum; they go to slot
    chunk + 1, where the carry wants them.
    """
    chunk, row_of = tl.program_id(0), tl.program_id(2)
    direction = row_of // batch
    group, channels, mask = channels_of(tl.program_id(1), per_group, BE)
    rates = load_channel(a_ptr + direction * N * E, channels, mask, E, N)
    weights, bias = load_weights(
        weight_ptr, bias_ptr, direction, channels, mask, E, RANK
    )
    state = ()
    for _ in tl.static_range(N):
        state = state + (tl.zeros([BE], tl.float32),)
    total = tl.zeros([BE], tl.float32)
    base = row_of.to(tl.int64) * L
    lanes = tl.zeros([BE], tl.int64) + group * N
    for t in range(chunk * T, min(chunk * T + T, L)):
        row = base + t
        u = tl.load(u_ptr + row * E + channels, mask=mask, other=0.0).to(tl.float32)
        dt = step_size(
            code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
        )
        B = load_states(b_ptr + row * b_stride + lanes, N, ASM)
        drive = dt * u
        total += dt
        after = ()
        for n in tl.static_range(N):
            after = after + (state[n] * tl.exp2(rates[n] * dt) + drive * B[n],)
        state = after
    slot = row_of.to(tl.int64) * (chunks + 1) + chunk + 1
    kept_ptr += slot * (N + 1) * E + channels
    for n in tl.static_range(N):
        tl.store(kept_ptr + n * E, state[n], mask=mask)
    tl.store(kept_ptr + N * E, total, mask=mask)
    # the first slot has no chunk before it
    tl.store(kept_ptr - E, tl.zeros([BE], tl.float32), mask=mask & (chunk == 0))


@triton.jit
def _compose(decay, value, next_decay, next_value):
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def carry_states(
    states_ptr,
    kept_ptr,
    a_ptr,
    E,
    batch,
    chunks,
    N: tl.constexpr,
    CT: tl.constexpr,
    BE: tl.constexpr,
    BACK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Carry states, laid out as `scan_chunks` keeps them, over the chunks, in place.

    Forward, slot i + 1 holds what chunk i adds, and slot i becomes the state that
    chunk i starts from. BACK, slot i - 1 holds what chunk i adds to the adjoint, and
    slot i becomes the adjoint that chunk i ends with. FIRST: the first slot holds a
    value to start from, otherwise it is zero.
    """
    channels = tl.program_id(0) * BE + tl.arange(0, BE)
    n, row_of = tl.program_id(1), tl.program_id(2)
    inside = (channels < E)[None, :]
    rate = tl.load(
        a_ptr + ((row_of // batch) * N + n) * E + channels, mask=channels < E, other=0.0
    )[None, :]
    base = row_of.to(tl.int64) * (chunks + 1)
    place = tl.arange(0, CT)[:, None]
    state = tl.zeros([1, BE], tl.float32)
    count = chunks + 1 - BACK
    for start in range(0, count, CT):
        i = start + place
        slot = base + (tl.where(i < count, chunks - 1 - i, 0) if BACK else i)
        here = (i < count) & inside
        pointers = states_ptr + (slot * (N + 1) + n) * E + channels[None, :]
        value = tl.load(pointers, mask=here & ((i > 0) | FIRST), other=0.0)
        sums = tl.load(
            kept_ptr + ((slot + 2 * BACK) * (N + 1) + N) * E + channels[None, :],
            mask=here & (i > 0),
            other=0.0,
        )
        decay = tl.exp2(rate * sums)
        decay, value = tl.associative_scan((decay, value), 0, _compose)
        value += decay * state
        tl.store(pointers, value, mask=here)
        last = place == CT - 1
        state = tl.sum(tl.where(last, value, 0.0), 0)[None, :]


@triton.jit
def scan_outputs(
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
    y_ptr,
    L,
    E,
    per_group,
    batch,
    chunks,
    code_stride,
    b_stride,
    c_stride,
    T,
    N: tl.constexpr,
    RANK: tl.constexpr,
    BE: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scan each chunk from its true first state; write y by token, or ADD to it."""
    chunk, row_of = tl.program_id(0), tl.program_id(2)
    direction = row_of // batch
    group, channels, mask = channels_of(tl.program_id(1), per_group, BE)
    rates = load_channel(a_ptr + direction * N * E, channels, mask, E, N)
    weights, bias = load_weights(
        weight_ptr, bias_ptr, direction, channels, mask, E, RANK
    )
    skip = tl.load(skip_ptr + direction * E + channels, mask=mask, other=0.0)
    slot = row_of.to(tl.int64) * (chunks + 1) + chunk
    state = load_channel(kept_ptr + slot * (N + 1) * E, channels, mask, E, N)
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    base = row_of.to(tl.int64) * L
    lanes = tl.zeros([BE], tl.int64) + group * N
    y_ptr += row_of.to(tl.int64) * L * E
    position, run, step = walk_from(chunk * T, stride, reverse, L)
    for t in range(chunk * T, min(chunk * T + T, L)):
        row = base + t
        u = tl.load(u_ptr + row * E + channels, mask=mask, other=0.0).to(tl.float32)
        dt = step_size(
            code_ptr, row, code_stride, weights, bias, channels, mask, RANK, ASM
        )
        B = load_states(b_ptr + row * b_stride + lanes, N, ASM)
        C = load_states(c_ptr + row * c_stride + lanes, N, ASM)
        drive = dt * u
        y = skip * u
        after = ()
        for n in tl.static_range(N):
            now = state[n] * tl.exp2(rates[n] * dt) + drive * B[n]
            y += now * C[n]
            after = after + (now,)
        state = after
        token = (position * (L // stride) + run).to(tl.int64)
        target = y_ptr + token * E + channels
        if ADD:
            y += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)
        position, run = walk_on(position, run, step, stride)
