"""Kernels around the scan: causal convolution with silu, gate, and their gradients.

A program is a tile of rows by channels. x and z are the halves of rows of xz, by token;
u and its gradient are by position, a (direction times batch) row of sequences each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segmamba.ops._triton.loads import LOG2E, token_of


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def tile_of(E, BT: tl.constexpr, BE: tl.constexpr):
    """(rows, channels) of a program's tile."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    return rows, tl.program_id(1) * BE + tl.arange(0, BE)[None, :]


@triton.jit
def load_x(xz_ptr, case, position, channels, inside, stride, reverse, L, E):
    """x at positions of an order, zero outside of the sequence."""
    valid = inside & (position >= 0) & (position < L)
    token = token_of(tl.where(valid, position, 0), stride, reverse, L)
    row = case.to(tl.int64) * L + token
    value = tl.load(xz_ptr + row * (2 * E) + channels, mask=valid, other=0.0)
    return value.to(tl.float32)


@triton.jit
def convolve(
    xz_ptr,
    weight,
    bias,
    case,
    rows,
    channels,
    inside,
    stride,
    reverse,
    L,
    E,
    W: tl.constexpr,
):
    """The convolution before silu at some positions."""
    total = bias
    for j in tl.static_range(W):
        place = rows - (W - 1 - j)
        x = load_x(xz_ptr, case, place, channels, inside, stride, reverse, L, E)
        total += weight[j] * x
    return total


@triton.jit
def load_taps(weight_ptr, bias_ptr, direction, channels, E, W: tl.constexpr):
    """The taps of some channels as a tuple of W rows, and their biases."""
    taps = ()
    for j in tl.static_range(W):
        pointers = weight_ptr + (direction * E + channels) * W + j
        taps = taps + (tl.load(pointers, mask=channels < E, other=0.0),)
    bias = tl.load(bias_ptr + direction * E + channels, mask=channels < E, other=0.0)
    return taps, bias


@triton.jit
def conv_silu(
    xz_ptr,
    weight_ptr,
    bias_ptr,
    orders_ptr,
    u_ptr,
    L,
    E,
    batch,
    W: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """u = silu(causal convolution of x along an order)."""
    rows, channels = tile_of(E, BT, BE)
    row_of = tl.program_id(2)
    direction, case = row_of // batch, row_of % batch
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    taps, bias = load_taps(weight_ptr, bias_ptr, direction, channels, E, W)
    inside = (rows < L) & (channels < E)
    total = convolve(
        xz_ptr, taps, bias, case, rows, channels, inside, stride, reverse, L, E, W
    )
    u = total * sigmoid(total)
    target = (row_of.to(tl.int64) * L + rows) * E + channels
    tl.store(u_ptr + target, u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def conv_silu_back(
    xz_ptr,
    weight_ptr,
    bias_ptr,
    orders_ptr,
    grad_ptr,
    partial_ptr,
    L,
    E,
    batch,
    W: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gradient of u to that of the convolution, in place; sums for taps and bias.

    A program does TILES tiles along the rows; partial is (rows, programs, W + 1, E).
    """
    channels = tl.program_id(1) * BE + tl.arange(0, BE)[None, :]
    row_of = tl.program_id(2)
    direction, case = row_of // batch, row_of % batch
    stride = tl.load(orders_ptr + 2 * direction)
    reverse = tl.load(orders_ptr + 2 * direction + 1)
    taps, bias = load_taps(weight_ptr, bias_ptr, direction, channels, E, W)
    sums = ()
    for _ in tl.static_range(W + 1):
        sums = sums + (tl.zeros([BT, BE], tl.float32),)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * BT + tl.arange(0, BT)[:, None]
        inside = (rows < L) & (channels < E)
        total = bias
        inputs = ()
        for j in tl.static_range(W):
            place = rows - (W - 1 - j)
            x = load_x(xz_ptr, case, place, channels, inside, stride, reverse, L, E)
            inputs = inputs + (x,)
            total += taps[j] * x
        gate = sigmoid(total)
        pointers = grad_ptr + (row_of.to(tl.int64) * L + rows) * E + channels
        grad = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        grad *= gate * (1.0 + total * (1.0 - gate))
        tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        after = ()
        for j in tl.static_range(W):
            after = after + (sums[j] + grad * inputs[j],)
        sums = after + (sums[W] + grad,)
    program = row_of.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    target = partial_ptr + program * (W + 1) * E + channels
    for j in tl.static_range(W + 1):
        tl.store(target + j * E, tl.sum(sums[j], 0)[None, :], mask=channels < E)


@triton.jit
def conv_input_back(
    grad_ptr,
    weight_ptr,
    orders_ptr,
    grad_xz_ptr,
    L,
    E,
    batch,
    K: tl.constexpr,
    W: tl.constexpr,
    ADD: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of x by token from those of K directions' convolutions."""
    rows, channels = tile_of(E, BT, BE)
    case = tl.program_id(2)
    inside = (rows < L) & (channels < E)
    target = grad_xz_ptr + (case.to(tl.int64) * L + rows) * (2 * E) + channels
    total = tl.zeros([BT, BE], tl.float32)
    if ADD:
        total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        stride = tl.load(orders_ptr + 2 * k)
        reverse = tl.load(orders_ptr + 2 * k + 1)
        per = L // stride
        place = (rows % per) * stride + rows // per
        place = tl.where(reverse != 0, L - 1 - place, place)
        base = (k * batch + case).to(tl.int64) * L
        for j in tl.static_range(W):
            tap = tl.load(
                weight_ptr + (k * E + channels) * W + (W - 1 - j),
                mask=channels < E,
                other=0.0,
            )
            valid = inside & (place + j < L)
            grad = tl.load(
                grad_ptr + (base + place + j) * E + channels, mask=valid, other=0.0
            )
            total += tap * grad.to(tl.float32)
    tl.store(target, total.to(grad_xz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate(
    y_ptr,
    xz_ptr,
    sum_ptr,
    out_ptr,
    L,
    E,
    K: tl.constexpr,
    KEEP: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """out = (sum of y over directions) silu(z), for L rows; KEEP writes the sum."""
    rows, channels = tile_of(E, BT, BE)
    inside = (rows < L) & (channels < E)
    row = rows.to(tl.int64)
    total = tl.zeros([BT, BE], tl.float32)
    for k in tl.static_range(K):
        place = (row + k * L) * E + channels
        total += tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(xz_ptr + row * (2 * E) + E + channels, mask=inside, other=0.0)
    z = z.to(tl.float32)
    if KEEP:
        kept = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * E + channels, kept, mask=inside)
    out = total * z * sigmoid(z)
    tl.store(
        out_ptr + row * E + channels, out.to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def gate_back(
    grad_ptr,
    sum_ptr,
    xz_ptr,
    grad_xz_ptr,
    grad_y_ptr,
    L,
    E,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradients of the gate: that of z into grad_xz, that of the sum into grad_y."""
    rows, channels = tile_of(E, BT, BE)
    inside = (rows < L) & (channels < E)
    row = rows.to(tl.int64)
    grad = tl.load(grad_ptr + row * E + channels, mask=inside, other=0.0)
    grad = grad.to(tl.float32)
    total = tl.load(sum_ptr + row * E + channels, mask=inside, other=0.0)
    place = row * (2 * E) + E + channels
    z = tl.load(xz_ptr + place, mask=inside, other=0.0).to(tl.float32)
    open_ = sigmoid(z)
    grad_z = grad * total.to(tl.float32) * open_ * (1.0 + z * (1.0 - open_))
    grad_y = grad * z * open_
    tl.store(grad_xz_ptr + place, grad_z.to(grad_xz_ptr.dtype.element_ty), mask=inside)
    tl.store(
        grad_y_ptr + row * E + channels,
        grad_y.to(grad_y_ptr.dtype.element_ty),
        mask=inside,
    )
