"""Vectors of 16 floats for Numba kernels, as LLVM vector values.

LLVM splits them where registers are narrower (AVX2, NEON). Written out like this, the
kernels don't depend on what the automatic vectoriser makes of a loop. All arrays are
one-dimensional, contiguous float32, and an index counts floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 16
"""Floats in a vector."""

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_FUSE = ("contract",)

# 2**r = 1 + r q(r) on [-0.5, 0.5]: our minimax fit, relative error below 1e-7.
_EXP2 = (
    1.0,
    0.6931469775997526,
    0.24022242085357828,
    0.05550733742307696,
    0.009671512641759151,
    0.0013264727490290352,
)
_EXP = tuple(1 / math.factorial(k) for k in range(8))
# 2 atanh(s) = s q(s**2) for s up to 1/3: its series, cut below 1e-8.
_ATANH = tuple(2 / (2 * k + 1) for k in range(8))
# Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
_ROUND = 12582912.0
_LN2_HIGH = 0.693359375


class _VectorType(types.Type):
    """Numba's name for 16 floats."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


VECTOR = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _splat(builder, scalar):
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    single = builder.insert_element(nothing, scalar, ir.Constant(_INT, 0))
    mask = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
    return builder.shuffle_vector(single, nothing, mask)


def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _polynomial(builder, x, coefficients: Sequence[float]):
    total = _constant(coefficients[-1])
    for value in reversed(coefficients[:-1]):
        total = _fma(builder, total, x, _constant(value))
    return total


def _clamp(builder, x, low: float, high: float):
    """Keep x between two bounds; not-a-number stays what it is."""
    below = builder.fcmp_ordered("<", x, _constant(low))
    x = builder.select(below, _constant(low), x)
    above = builder.fcmp_ordered(">", x, _constant(high))
    return builder.select(above, _constant(high), x)


def _scale(builder, value, shifted):
    """Multiply by two to the integer in the low bits of `shifted`."""
    exponent = builder.shl(
        builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES)
    )
    bits = builder.add(builder.bitcast(value, _INTS), exponent)
    return builder.bitcast(bits, _VECTOR)


def _exp2(builder, x):
    x = _clamp(builder, x, -126.0, 128.0)
    shifted = builder.fadd(x, _constant(_ROUND))
    rest = builder.fsub(x, builder.fsub(shifted, _constant(_ROUND)))
    return _scale(builder, _polynomial(builder, rest, _EXP2), shifted)


def _exp(builder, x):
    """exp(x), with log(2) in two parts so that large x lose no digits."""
    x = _clamp(builder, x, -87.3, 88.0)
    scaled = builder.fmul(x, _constant(1 / math.log(2)))
    shifted = builder.fadd(scaled, _constant(_ROUND))
    whole = builder.fsub(shifted, _constant(_ROUND))
    rest = _fma(builder, whole, _constant(-_LN2_HIGH), x)
    rest = _fma(builder, whole, _constant(_LN2_HIGH - math.log(2)), rest)
    return _scale(builder, _polynomial(builder, rest, _EXP), shifted)


def _negative(builder, x):
    return builder.fsub(_constant(-0.0), x)


def _sigmoid(builder, x):
    one = _constant(1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, _negative(builder, x))))


def _softplus(builder, x):
    """max(x, 0) + log1p(exp(-|x|)), the logarithm as 2 atanh(e / (2 + e))."""
    zero = _constant(0.0)
    positive = builder.fcmp_ordered(">", x, zero)
    small = builder.select(positive, _negative(builder, x), x)
    grown = _exp(builder, small)
    ratio = builder.fdiv(grown, builder.fadd(_constant(2.0), grown))
    square = builder.fmul(ratio, ratio)
    logarithm = builder.fmul(ratio, _polynomial(builder, square, _ATANH))
    return builder.fadd(builder.select(positive, x, zero), logarithm)


def _address(context, builder, kind, array, index):
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _define(arity: int, build):
    """Make an intrinsic of `arity` vectors from a function of (builder, *vectors)."""

    def generate(context, builder, signature, arguments):
        return build(builder, *arguments)

    if arity == 1:

        @intrinsic
        def unary(typing_context, a):
            return VECTOR(a), generate

        return unary
    if arity == 2:

        @intrinsic
        def binary(typing_context, a, b):
            return VECTOR(a, b), generate

        return binary

    @intrinsic
    def ternary(typing_context, a, b, c):
        return VECTOR(a, b, c), generate

    return ternary


add = _define(2, lambda builder, a, b: builder.fadd(a, b, flags=_FUSE))
"""a + b."""
mul = _define(2, lambda builder, a, b: builder.fmul(a, b, flags=_FUSE))
"""a * b."""
fma = _define(3, _fma)
"""a * b + c."""
exp2 = _define(1, _exp2)
"""2**a, in [2**-126, infinity]."""
sigmoid = _define(1, _sigmoid)
"""1 / (1 + exp(-a))."""
softplus = _define(1, _softplus)
"""log(1 + exp(a)), equal to a in float32 above 20."""


@intrinsic
def load(typing_context, array, index):
    """Read 16 floats of an array from an index on."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(address, _VECTOR.as_pointer())
        return builder.load(pointer, align=4)

    return VECTOR(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, value):
    """Write 16 floats to an array from an index on."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        address = _address(context, builder, signature.args[0], array, index)
        pointer = builder.bitcast(address, _VECTOR.as_pointer())
        builder.store(value, pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def splat(typing_context, scalar):
    """Put one float in all 16 places."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return VECTOR(types.float32), generate


@intrinsic
def zeros(typing_context):
    """16 zeros."""

    def generate(context, builder, signature, arguments):
        return _constant(0.0)

    return VECTOR(), generate


@intrinsic
def total(typing_context, vector):
    """Add the 16 floats up, always in the same order."""

    def generate(context, builder, signature, arguments):
        value, width = arguments[0], LANES
        while width > 1:
            width //= 2
            kind = ir.VectorType(_INT, width)
            low = ir.Constant(kind, list(range(width)))
            high = ir.Constant(kind, list(range(width, 2 * width)))
            value = builder.fadd(
                builder.shuffle_vector(value, value, low),
                builder.shuffle_vector(value, value, high),
            )
        return builder.extract_element(value, ir.Constant(_INT, 0))

    return types.float32(vector), generate
