"""Vectors of 16 floats for Numba kernels, as LLVM vector values.

LLVM splits them where registers are narrower (AVX2, NEON). Written out like this, the
kernels don't depend on what the automatic vectoriser makes of a loop. All arrays are
one-dimensional, contiguous float32, and an index counts floats.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Sequence

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from segmamba.ops._layout import LANES, STATES

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)

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
    """Numba's name for a vector of floats."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


VECTOR = _VectorType(LANES)
WIDE = _VectorType(LANES * STATES)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.lanes))


def _constant(like, value: float) -> ir.Constant:
    """A vector as long as another one, all of one value."""
    return ir.Constant(
        ir.VectorType(_FLOAT, like.type.count),
        [float(np.float32(value))] * like.type.count,
    )


def _integers(count: int, values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, count), list(values))


def _splat(builder, scalar):
    nothing = ir.Constant(ir.VectorType(_FLOAT, LANES), ir.Undefined)
    single = builder.insert_element(nothing, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(single, nothing, _integers(LANES, [0] * LANES))


def _join(builder, parts):
    """Put vectors behind one another, two by two."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        mask = _integers(count, range(count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(a, b, mask) for a, b in pairs]
    return parts[0]


def _halves(builder, value):
    half = value.type.count // 2
    low = _integers(half, range(half))
    high = _integers(half, range(half, 2 * half))
    return (
        builder.shuffle_vector(value, value, low),
        builder.shuffle_vector(value, value, high),
    )


def _fold(builder, value, lanes: int):
    """Add the upper half to the lower one until `lanes` floats are left."""
    while value.type.count > lanes:
        value = builder.fadd(*_halves(builder, value))
    return value


@functools.cache
def _has_fma() -> bool:
    """Whether this processor rounds a * b + c once; all but old x86 ones do."""
    if not platform.machine().lower().startswith(("x86", "amd", "i")):
        return True
    return bool(llvm.get_host_cpu_features().get("fma"))


def _fma(builder, a, b, c):
    """A * b + c; said and not left to LLVM, which would fuse differently by context."""
    if not _has_fma():
        return builder.fadd(builder.fmul(a, b), c)
    function = builder.module.declare_intrinsic(
        f"llvm.fma.v{a.type.count}f32", (), ir.FunctionType(a.type, [a.type] * 3)
    )
    return builder.call(function, [a, b, c])


def _polynomial(builder, x, coefficients: Sequence[float]):
    total = _constant(x, coefficients[-1])
    for value in reversed(coefficients[:-1]):
        total = _fma(builder, total, x, _constant(x, value))
    return total


def _clamp(builder, x, low: float, high: float):
    """Keep x between two bounds; not-a-number stays what it is."""
    below = builder.fcmp_ordered("<", x, _constant(x, low))
    x = builder.select(below, _constant(x, low), x)
    above = builder.fcmp_ordered(">", x, _constant(x, high))
    return builder.select(above, _constant(x, high), x)


def _scale(builder, value, shifted):
    """Multiply by two to the integer in the low bits of `shifted`."""
    count = value.type.count
    integers = ir.VectorType(_INT, count)
    exponent = builder.shl(
        builder.bitcast(shifted, integers), _integers(count, [23] * count)
    )
    bits = builder.add(builder.bitcast(value, integers), exponent)
    return builder.bitcast(bits, value.type)


def _exp2(builder, x):
    x = _clamp(builder, x, -126.0, 128.0)
    shifted = builder.fadd(x, _constant(x, _ROUND))
    rest = builder.fsub(x, builder.fsub(shifted, _constant(x, _ROUND)))
    return _scale(builder, _polynomial(builder, rest, _EXP2), shifted)


def _exp(builder, x):
    """exp(x), with log(2) in two parts so that large x lose no digits."""
    x = _clamp(builder, x, -87.3, 88.0)
    scaled = builder.fmul(x, _constant(x, 1 / math.log(2)))
    shifted = builder.fadd(scaled, _constant(x, _ROUND))
    whole = builder.fsub(shifted, _constant(x, _ROUND))
    rest = _fma(builder, whole, _constant(x, -_LN2_HIGH), x)
    rest = _fma(builder, whole, _constant(x, _LN2_HIGH - math.log(2)), rest)
    return _scale(builder, _polynomial(builder, rest, _EXP), shifted)


def _negative(builder, x):
    return builder.fsub(_constant(x, -0.0), x)


def _sigmoid(builder, x):
    one = _constant(x, 1.0)
    return builder.fdiv(one, builder.fadd(one, _exp(builder, _negative(builder, x))))


def _softplus(builder, x):
    """max(x, 0) + log1p(exp(-|x|)), the logarithm as 2 atanh(e / (2 + e))."""
    zero = _constant(x, 0.0)
    positive = builder.fcmp_ordered(">", x, zero)
    small = builder.select(positive, _negative(builder, x), x)
    grown = _exp(builder, small)
    ratio = builder.fdiv(grown, builder.fadd(_constant(x, 2.0), grown))
    square = builder.fmul(ratio, ratio)
    logarithm = builder.fmul(ratio, _polynomial(builder, square, _ATANH))
    return builder.fadd(builder.select(positive, x, zero), logarithm)


def _address(context, builder, kind, array, index):
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index])


def _pointer(context, builder, kind, array, index, lanes: int):
    address = _address(context, builder, kind, array, index)
    return builder.bitcast(address, ir.VectorType(_FLOAT, lanes).as_pointer())


def _define(arity: int, build):
    """Make an intrinsic of `arity` like vectors from a function of (builder, *them)."""

    def generate(context, builder, signature, arguments):
        return build(builder, *arguments)

    if arity == 1:

        @intrinsic
        def unary(typing_context, a):
            return a(a), generate

        return unary
    if arity == 2:

        @intrinsic
        def binary(typing_context, a, b):
            return a(a, b), generate

        return binary

    @intrinsic
    def ternary(typing_context, a, b, c):
        return a(a, b, c), generate

    return ternary


def _define_load(kind: _VectorType):
    @intrinsic
    def read(typing_context, array, index):
        def generate(context, builder, signature, arguments):
            pointer = _pointer(
                context, builder, signature.args[0], *arguments, kind.lanes
            )
            return builder.load(pointer, align=4)

        return kind(array, types.intp), generate

    return read


add = _define(2, lambda builder, a, b: builder.fadd(a, b))
"""a + b."""
mul = _define(2, lambda builder, a, b: builder.fmul(a, b))
"""a * b."""
fma = _define(3, _fma)
"""a * b + c."""
exp2 = _define(1, _exp2)
"""2**a, in [2**-126, infinity]."""
sigmoid = _define(1, _sigmoid)
"""1 / (1 + exp(-a))."""
softplus = _define(1, _softplus)
"""log(1 + exp(a)), equal to a in float32 above 20."""
load = _define_load(VECTOR)
"""load(array, index): 16 floats from an index on."""
load_wide = _define_load(WIDE)
"""load_wide(array, index): 4 times 16 floats from an index on."""


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector or a wide vector to an array from an index on."""

    def generate(context, builder, signature, arguments):
        array, index, value = arguments
        pointer = _pointer(
            context, builder, signature.args[0], array, index, value.type.count
        )
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
def splat_at(typing_context, array, index):
    """Put one float of an array in all 16 places."""

    def generate(context, builder, signature, arguments):
        address = _address(context, builder, signature.args[0], *arguments)
        return _splat(builder, builder.load(address))

    return VECTOR(array, types.intp), generate


@intrinsic
def splat_wide(typing_context, array, index):
    """Put each of 4 floats of an array in 16 places."""

    def generate(context, builder, signature, arguments):
        array, index = arguments
        address = _address(context, builder, signature.args[0], array, index)
        places = [builder.gep(address, [ir.Constant(_INT, n)]) for n in range(STATES)]
        return _join(builder, [_splat(builder, builder.load(p)) for p in places])

    return WIDE(array, types.intp), generate


@intrinsic
def widen(typing_context, vector):
    """Repeat a vector 4 times."""

    def generate(context, builder, signature, arguments):
        return _join(builder, [arguments[0]] * STATES)

    return WIDE(vector), generate


@intrinsic
def fold(typing_context, wide):
    """Add the 4 vectors of a wide one up."""

    def generate(context, builder, signature, arguments):
        return _fold(builder, arguments[0], LANES)

    return VECTOR(wide), generate


@intrinsic
def zeros(typing_context):
    """16 zeros."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.VectorType(_FLOAT, LANES), [0.0] * LANES)

    return VECTOR(), generate


@intrinsic
def total(typing_context, vector):
    """Add the 16 floats up, always in the same order."""

    def generate(context, builder, signature, arguments):
        low, high = _halves(builder, _fold(builder, arguments[0], 2))
        zero = ir.Constant(_INT, 0)
        return builder.fadd(
            builder.extract_element(low, zero), builder.extract_element(high, zero)
        )

    return types.float32(vector), generate


@intrinsic
def totals(typing_context, array, index):
    """Add each of 16 vectors, one behind the other, up; as 16 floats in their order."""

    def generate(context, builder, signature, arguments):
        array, index = arguments
        address = _address(context, builder, signature.args[0], array, index)
        kind = ir.VectorType(_FLOAT, LANES).as_pointer()
        even = _integers(LANES, range(0, 2 * LANES, 2))
        odd = _integers(LANES, range(1, 2 * LANES, 2))
        rows = []
        for n in range(LANES):
            place = builder.gep(address, [ir.Constant(_INT, n * LANES)])
            rows.append(builder.load(builder.bitcast(place, kind), align=4))
        while len(rows) > 1:
            rows = [
                builder.fadd(
                    builder.shuffle_vector(a, b, even),
                    builder.shuffle_vector(a, b, odd),
                )
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        return rows[0]

    return VECTOR(array, types.intp), generate
