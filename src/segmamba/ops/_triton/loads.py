"""Small pieces that the scan's kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_four(pointers, ASM: tl.constexpr, OWN: tl.constexpr = False):
    """Four neighbours in memory for each pointer, as four float32 tensors.

    With ASM they are one load of 8 or 16 aligned bytes, which the compiler would not
    make: it sees one value a thread. Triton's interpreter has no assembler. OWN memory
    is written by this kernel too, so that loads must keep their place.
    """
    if ASM:
        if pointers.dtype.element_ty == tl.float32:
            a, b, c, d = tl.inline_asm_elementwise(
                "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,l",
                [pointers],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=not OWN,
                pack=1,
            )
            return a, b, c, d
        low, high = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointers],
            dtype=(tl.int32, tl.int32),
            is_pure=not OWN,
            pack=1,
        )
        if pointers.dtype.element_ty == tl.bfloat16:
            a = (low << 16).to(tl.float32, bitcast=True)
            b = (low & -65536).to(tl.float32, bitcast=True)
            c = (high << 16).to(tl.float32, bitcast=True)
            d = (high & -65536).to(tl.float32, bitcast=True)
            return a, b, c, d
        a = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        c = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        d = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return a, b, c, d
    a = tl.load(pointers).to(tl.float32)
    b = tl.load(pointers + 1).to(tl.float32)
    c = tl.load(pointers + 2).to(tl.float32)
    d = tl.load(pointers + 3).to(tl.float32)
    return a, b, c, d


@triton.jit
def store_four(pointers, a, b, c, d, valid, ASM: tl.constexpr):
    """Store four neighbours in memory for each pointer where `valid`."""
    kind: tl.constexpr = pointers.dtype.element_ty
    if ASM:
        flag = valid.to(tl.int32)
        pointers = pointers.to(tl.int64)
        if kind == tl.float32:
            tl.inline_asm_elementwise(
                """{ .reg .pred p; setp.ne.s32 p, $6, 0;
                @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }""",
                "=r,l,f,f,f,f,r",
                [pointers, a, b, c, d, flag],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        elif kind == tl.bfloat16:
            tl.inline_asm_elementwise(
                """{ .reg .pred p; .reg .b32 x, y; setp.ne.s32 p, $6, 0;
                cvt.rn.bf16x2.f32 x, $3, $2; cvt.rn.bf16x2.f32 y, $5, $4;
                @p st.global.v2.b32 [$1], {x, y}; mov.b32 $0, 0; }""",
                "=r,l,f,f,f,f,r",
                [pointers, a, b, c, d, flag],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.inline_asm_elementwise(
                """{ .reg .pred p; .reg .b32 x, y; setp.ne.s32 p, $6, 0;
                cvt.rn.f16x2.f32 x, $3, $2; cvt.rn.f16x2.f32 y, $5, $4;
                @p st.global.v2.b32 [$1], {x, y}; mov.b32 $0, 0; }""",
                "=r,l,f,f,f,f,r",
                [pointers, a, b, c, d, flag],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    else:
        tl.store(pointers, a.to(kind), mask=valid)
        tl.store(pointers + 1, b.to(kind), mask=valid)
        tl.store(pointers + 2, c.to(kind), mask=valid)
        tl.store(pointers + 3, d.to(kind), mask=valid)


@triton.jit
def load_states(pointers, COUNT: tl.constexpr, ASM: tl.constexpr):
    """COUNT neighbours in memory for each pointer, as a tuple of float32 tensors."""
    values = ()
    for n in tl.static_range(0, COUNT, 4):
        a, b, c, d = load_four(pointers + n, ASM)
        values = values + (a, b, c, d)
    return values


@triton.jit
def softplus(x, ASM: tl.constexpr):
    """log(1 + exp(x)): a series where that would cancel, linear above 20."""
    raised = tl.exp2(x * LOG2E)
    if ASM:
        logarithm = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;",
            "=f,f",
            [1.0 + raised],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        logarithm = tl.log2(1.0 + raised)
    series = raised * (1.0 - raised * (0.5 - raised * (1.0 / 3.0 - raised * 0.25)))
    small = tl.where(raised < 0.03125, series, logarithm * LN2)
    return tl.where(x > 20.0, x, small)


@triton.jit
def token_of(position, stride, reverse, L):
    """The token at a position of an order; see `segmamba.ops.orders.scan_order`."""
    place = tl.where(reverse != 0, L - 1 - position, position)
    return (place % stride) * (L // stride) + place // stride


@triton.jit
def walk_from(position, stride, reverse, L):
    """Where a walk along an order stands: (place in a run, run, step)."""
    place = tl.where(reverse != 0, L - 1 - position, position)
    step = tl.where(reverse != 0, -1, 1)
    return place % stride, place // stride, step


@triton.jit
def walk_on(inside, run, step, stride):
    """The next place of a walk, without a division."""
    inside += step
    over, under = inside == stride, inside < 0
    inside = tl.where(over, 0, tl.where(under, stride - 1, inside))
    run += over.to(tl.int32) - under.to(tl.int32)
    return inside, run
