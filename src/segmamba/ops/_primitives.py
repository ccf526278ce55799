"""The operators of torch.library that the public functions are made of.

Rows are channels-last: (batch, L, channels). Kernels are imported at the first call, so
that this module works where Numba or a GPU is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmamba.ops._chunked import scan_chunked, scan_chunked_backward
from segmamba.ops._differentiable import (
    differentiable,
    direct_or,
    direct_without_gradients,
)
from segmamba.ops._layout import LANES, STATES, ScanInputs, kept_shape


def _numba() -> Any:
    return importlib.import_module("segmamba.ops._numba.operators")


# --- the scan -------------------------------------------------------------------------


def _scan_rows(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, method: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan rows; arguments and results as `scan_reference`.

    `method` is "chunked" or "numba"; `keep` keeps the states that the latter needs for
    its backward, as a third result.
    """
    if method == "numba":
        return _numba().scan_rows(u, dt, A, B, C, keep)
    return *scan_chunked(u, dt, A, B, C), u.new_empty(0)


scan_operator = torch.library.custom_op(
    "segmamba::scan_rows", _scan_rows, mutates_args=()
)


@scan_operator.register_fake
def _(u, dt, A, B, C, method, keep):
    kept: Sequence[int] = (0,)
    if method == "numba" and keep:
        groups, states = B.shape[2:]
        channels = groups * (-(-(u.shape[2] // groups) // LANES)) * LANES
        kept = kept_shape(*u.shape[:2], channels, -(-states // STATES) * STATES)
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape[0], *A.shape),
        u.new_empty(kept),
    )


@torch.library.custom_op("segmamba::scan_rows_backward", mutates_args=())
def scan_rows_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scan_rows` with respect to u, dt, A, B and C."""
    if method == "numba":
        return _numba().scan_rows_backward(grad_y, grad_last, u, dt, A, B, C, kept)
    return scan_chunked_backward(grad_y, grad_last, u, dt, A, B, C)


@scan_rows_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, kept, method):
    return tuple(x.new_empty(x.shape) for x in (u, dt, A, B, C))


def _scan_context(ctx, inputs, output):
    *tensors, ctx.method, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _scan_gradients(ctx, grad_y, grad_last, grad_kept):
    grads = (grad_y.contiguous(), grad_last.contiguous())
    gradients = scan_rows_backward(*grads, *ctx.saved_tensors, ctx.method)
    return (*gradients, None, None)


scan_operator.register_autograd(_scan_gradients, setup_context=_scan_context)
scan_rows = direct_without_gradients(scan_operator, _scan_rows)

# --- the scan, by CUDA ----------------------------------------------------------------


def _selective(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    last: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan by channels; see `_cuda.selective.scan`."""
    from segmamba.ops._cuda import selective

    inputs = ScanInputs(u, delta, A, B, C, D, z, bias)
    return selective.scan(inputs, softplus, last, keep)


selective_operator = torch.library.custom_op(
    "segmamba::selective_scan", _selective, mutates_args=()
)


@selective_operator.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, last, keep):
    from segmamba.ops._cuda.selective import kept_shape

    states = A.new_empty((u.shape[0], *A.shape) if last else (0,))
    return torch.empty_like(u), states, A.new_empty(kept_shape(u) if keep else (0,))


def _selective_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    softplus: bool,
) -> list[Tensor]:
    """Gradients of the tensors u to bias, empty for what is None."""
    from segmamba.ops._cuda import selective

    inputs = ScanInputs(u, delta, A, B, C, D, z, bias)
    return selective.scan_backward(grad, grad_last, inputs, kept, softplus)


selective_backward_operator = torch.library.custom_op(
    "segmamba::selective_scan_backward", _selective_backward, mutates_args=()
)


@selective_backward_operator.register_fake
def _(grad, grad_last, u, delta, A, B, C, D, z, bias, kept, softplus):
    given = (u, delta, A, B, C, D, z, bias)
    return [A.new_empty(0) if x is None else torch.empty_like(x) for x in given]


def _selective_context(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.last, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _selective_gradients(ctx, grad, grad_last, grad_kept):
    *given, kept = ctx.saved_tensors
    grad = torch.zeros_like(given[0]) if grad is None else grad.contiguous()
    if grad_last is not None:
        grad_last = grad_last.contiguous() if ctx.last else None
    backward = direct_or(selective_backward_operator, _selective_backward)
    found = backward(grad, grad_last, *given, kept, ctx.softplus)
    pairs = zip(given, found, strict=True)
    return *(None if x is None else of_x for x, of_x in pairs), None, None, None


selective = differentiable(
    selective_operator, _selective, _selective_context, _selective_gradients
)

# --- the convolution, by Numba --------------------------------------------------------


def _conv_rows(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Convolve rows x (batch, L, E) causally with taps (E, W), then silu if asked."""
    return _numba().conv_rows(x, weight, bias, silu)


conv_operator = torch.library.custom_op(
    "segmamba::conv_rows", _conv_rows, mutates_args=()
)


@conv_operator.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("segmamba::conv_rows_backward", mutates_args=())
def conv_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `conv_rows` with respect to x, weight and bias."""
    return _numba().conv_rows_backward(grad, x, weight, bias, silu)


@conv_rows_backward.register_fake
def _(grad, x, weight, bias, silu):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _conv_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx, grad):
    return (*conv_rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.silu), None)


conv_operator.register_autograd(_conv_gradients, setup_context=_conv_context)
conv_rows = direct_without_gradients(conv_operator, _conv_rows)

# --- the tri-orientated scan, by Numba ------------------------------------------------


def _tri_scan(
    xz: Tensor,
    parameters: Sequence[Tensor],
    strides: Sequence[int],
    reverses: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate; see `_numba.tri_scan`.

    `parameters` are the seven of each direction, direction after direction.
    """
    from segmamba.ops._numba import tri_scan as fused

    with torch.autocast("cpu", enabled=False):
        return fused.tri_scan(
            xz, _by_direction(parameters), _orders(strides, reverses), keep
        )


tri_operator = torch.library.custom_op("segmamba::tri_scan", _tri_scan, mutates_args=())


@tri_operator.register_fake
def _(xz, parameters, strides, reverses, keep):
    batch, length, width = xz.shape
    out = xz.new_empty(batch, length, width // 2)
    if not keep:
        return out, xz.new_empty(0), xz.new_empty(0)
    kept = kept_shape(batch, length, width // 2, parameters[5].shape[1])
    return out, torch.empty_like(out), xz.new_empty(len(strides), *kept)


@torch.library.custom_op("segmamba::tri_scan_backward", mutates_args=())
def tri_scan_backward(
    grad: Tensor,
    xz: Tensor,
    y: Tensor,
    kept: Tensor,
    parameters: Sequence[Tensor],
    strides: Sequence[int],
    reverses: Sequence[int],
) -> list[Tensor]:
    """Gradients of `tri_scan` with respect to xz and each parameter, in this order."""
    from segmamba.ops._numba import tri_scan as fused

    orders = _orders(strides, reverses)
    with torch.autocast("cpu", enabled=False):
        grad_xz, gradients = fused.tri_scan_backward(
            grad, xz, y, kept, _by_direction(parameters), orders
        )
    return [grad_xz, *(g.contiguous() for direction in gradients for g in direction)]


@tri_scan_backward.register_fake
def _(grad, xz, y, kept, parameters, strides, reverses):
    return [torch.empty_like(x) for x in (xz, *parameters)]


def _by_direction(parameters: Sequence[Tensor]) -> list:
    tensors = list(parameters)
    return [tuple(tensors[i : i + 7]) for i in range(0, len(tensors), 7)]


def _orders(strides: Sequence[int], reverses: Sequence[int]) -> list[tuple[int, bool]]:
    return [(s, bool(r)) for s, r in zip(strides, reverses, strict=True)]


def _tri_context(ctx, inputs, output):
    xz, parameters, ctx.strides, ctx.reverses, _ = inputs
    ctx.save_for_backward(xz, *output[1:], *parameters)


def _tri_gradients(ctx, grad, grad_y, grad_kept):
    xz, y, kept, *parameters = ctx.saved_tensors
    grad_xz, *gradients = tri_scan_backward(
        grad.contiguous(), xz, y, kept, parameters, ctx.strides, ctx.reverses
    )
    return grad_xz, gradients, None, None, None


tri_operator.register_autograd(_tri_gradients, setup_context=_tri_context)
tri_scan = direct_without_gradients(tri_operator, _tri_scan)

# --- the mixer, by CUDA ---------------------------------------------------------------


def _form(strides, reverses, states, rank, taps):
    from segmamba.ops._cuda.directions import Form

    return Form(tuple(_orders(strides, reverses)), states, rank, taps)


def _mix(
    tokens: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    flat: Tensor,
    strides: Sequence[int],
    reverses: Sequence[int],
    states: int,
    rank: int,
    taps: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix tokens; see `_cuda.mixer.mix`."""
    from segmamba.ops._cuda import mixer

    form = _form(strides, reverses, states, rank, taps)
    with torch.autocast(tokens.device.type, enabled=False):
        return mixer.mix(tokens, in_proj, out_proj, flat, form, keep)


mix_operator = torch.library.custom_op("segmamba::mix", _mix, mutates_args=())


@mix_operator.register_fake
def _(tokens, in_proj, out_proj, flat, strides, reverses, states, rank, taps, keep):
    from segmamba.ops._cuda.launch import kept_shape

    out = torch.empty_like(tokens)
    if not keep:
        return out, tokens.new_empty(0), tokens.new_empty(0)
    (batch, length, _), channels = tokens.shape, out_proj.shape[1]
    kept = kept_shape(len(strides) * batch, length, channels)
    total = tokens.new_empty(batch, length, channels)
    return out, total, tokens.new_empty(kept, dtype=torch.float32)


def _mix_backward(
    grad: Tensor,
    tokens: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    flat: Tensor,
    total: Tensor,
    kept: Tensor,
    strides: Sequence[int],
    reverses: Sequence[int],
    states: int,
    rank: int,
    taps: int,
) -> list[Tensor]:
    """Gradients of `mix` for tokens, projections and parameters."""
    from segmamba.ops._cuda import mixer

    form = _form(strides, reverses, states, rank, taps)
    tensors = (grad, tokens, in_proj, out_proj, flat, total, kept)
    with torch.autocast(tokens.device.type, enabled=False):
        return mixer.mix_backward(*tensors, form)


mix_backward_operator = torch.library.custom_op(
    "segmamba::mix_backward", _mix_backward, mutates_args=()
)


@mix_backward_operator.register_fake
def _(grad, tokens, in_proj, out_proj, flat, *others):
    return [torch.empty_like(x) for x in (tokens, in_proj, out_proj, flat)]


def _mix_context(ctx, inputs, output):
    *tensors, strides, reverses, states, rank, taps, _ = inputs
    ctx.form = strides, reverses, states, rank, taps
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _mix_gradients(ctx, grad, grad_total, grad_kept):
    backward = direct_or(mix_backward_operator, _mix_backward)
    return *backward(grad, *ctx.saved_tensors, *ctx.form), *(None,) * 6


mix = differentiable(mix_operator, _mix, _mix_context, _mix_gradients)
