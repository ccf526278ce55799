"""The operators of torch.library that the public functions are made of.

Rows are channels-last: (batch, L, channels). Kernels are imported at the first call, so
that this module works where Numba or Triton is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmamba.ops._chunked import scan_chunked, scan_chunked_backward
from segmamba.ops._layout import LANES, STATES, kept_shape


def _operators(method: str) -> Any:
    """The module of operators of "numba" or "cuda"."""
    return importlib.import_module(f"segmamba.ops._{method}.operators")


# --- the scan -------------------------------------------------------------------------


@torch.library.custom_op("segmamba::scan_rows", mutates_args=())
def scan_rows(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, method: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan rows; arguments and results as `scan_reference`.

    `method` is "chunked", "numba" or "cuda"; `keep` keeps the states that the last
    two need for their backward, as a third result.
    """
    if method != "chunked":
        return _operators(method).scan_rows(u, dt, A, B, C, keep)
    return *scan_chunked(u, dt, A, B, C), u.new_empty(0)


@scan_rows.register_fake
def _(u, dt, A, B, C, method, keep):
    kept: Sequence[int] = (0,)
    if method == "numba" and keep:
        groups, states = B.shape[2:]
        channels = groups * (-(-(u.shape[2] // groups) // LANES)) * LANES
        kept = kept_shape(*u.shape[:2], channels, -(-states // STATES) * STATES)
    elif method == "cuda" and keep:
        kept = _operators(method).scan_kept_shape(u, A, B)
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
    if method != "chunked":
        backward = _operators(method).scan_rows_backward
        return backward(grad_y, grad_last, u, dt, A, B, C, kept)
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


scan_rows.register_autograd(_scan_gradients, setup_context=_scan_context)

# --- the convolution, by Numba --------------------------------------------------------


@torch.library.custom_op("segmamba::conv_rows", mutates_args=())
def conv_rows(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Convolve rows x (batch, L, E) causally with taps (E, W), then silu if asked."""
    return _operators("numba").conv_rows(x, weight, bias, silu)


@conv_rows.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("segmamba::conv_rows_backward", mutates_args=())
def conv_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `conv_rows` with respect to x, weight and bias."""
    return _operators("numba").conv_rows_backward(grad, x, weight, bias, silu)


@conv_rows_backward.register_fake
def _(grad, x, weight, bias, silu):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _conv_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx, grad):
    return (*conv_rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.silu), None)


conv_rows.register_autograd(_conv_gradients, setup_context=_conv_context)

# --- the tri-orientated scan, by Numba ------------------------------------------------


@torch.library.custom_op("segmamba::tri_scan", mutates_args=())
def tri_scan(
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


@tri_scan.register_fake
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


tri_scan.register_autograd(_tri_gradients, setup_context=_tri_context)

# --- the tri-orientated scan, by CUDA -------------------------------------------------


@torch.library.custom_op("segmamba::tri_scan_gpu", mutates_args=())
def tri_scan_gpu(
    xz: Tensor,
    parameters: Sequence[Tensor],
    strides: Sequence[int],
    reverses: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan tokens in several orders, sum and gate; see `_cuda.operators.tri_scan`."""
    orders = tuple(_orders(strides, reverses))
    with torch.autocast(xz.device.type, enabled=False):
        return _operators("cuda").tri_scan(xz, parameters, orders, keep)


@tri_scan_gpu.register_fake
def _(xz, parameters, strides, reverses, keep):
    batch, length, width = xz.shape
    out = xz.new_empty(batch, length, width // 2)
    if not keep:
        return out, xz.new_empty(0), xz.new_empty(0)
    kept = _operators("cuda").tri_kept_shape(xz, len(strides))
    return out, torch.empty_like(out), xz.new_empty(kept, dtype=torch.float32)


@torch.library.custom_op("segmamba::tri_scan_gpu_backward", mutates_args=())
def tri_scan_gpu_backward(
    grad: Tensor,
    xz: Tensor,
    total: Tensor,
    kept: Tensor,
    parameters: Sequence[Tensor],
    strides: Sequence[int],
    reverses: Sequence[int],
) -> list[Tensor]:
    """Gradients of `tri_scan_gpu` for xz and the parameters, stacked by kind."""
    orders = tuple(_orders(strides, reverses))
    backward = _operators("cuda").tri_scan_backward
    with torch.autocast(xz.device.type, enabled=False):
        return backward(grad, xz, total, kept, parameters, orders)


@tri_scan_gpu_backward.register_fake
def _(grad, xz, total, kept, parameters, strides, reverses):
    kinds = (x.new_empty(len(strides), *x.shape) for x in parameters[:7])
    return [torch.empty_like(xz), *kinds]


def _tri_gpu_gradients(ctx, grad, grad_total, grad_kept):
    xz, total, kept, *parameters = ctx.saved_tensors
    grad_xz, *kinds = tri_scan_gpu_backward(
        grad.contiguous(), xz, total, kept, parameters, ctx.strides, ctx.reverses
    )
    gradients = [kind[k] for k in range(len(ctx.strides)) for kind in kinds]
    return grad_xz, gradients, None, None, None


tri_scan_gpu.register_autograd(_tri_gpu_gradients, setup_context=_tri_context)
