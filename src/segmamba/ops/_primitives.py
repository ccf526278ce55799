"""The operators of torch.library that the public functions are made of.

Rows are channels-last: (batch, L, channels). Numba's kernels are imported at the first
call, so that this module works where Numba is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segmamba.ops._chunked import scan_chunked, scan_chunked_backward


@torch.library.custom_op("segmamba::scan_rows", mutates_args=())
def scan_rows(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, method: str
) -> tuple[Tensor, Tensor]:
    """Scan rows; arguments and results as `scan_reference`, method a back end."""
    return scan_chunked(u, dt, A, B, C)


@scan_rows.register_fake
def _(u, dt, A, B, C, method):
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape)


@torch.library.custom_op("segmamba::scan_rows_backward", mutates_args=())
def scan_rows_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scan_rows` with respect to u, dt, A, B and C."""
    return scan_chunked_backward(grad_y, grad_last, u, dt, A, B, C)


@scan_rows_backward.register_fake
def _(grad_y, grad_last, u, dt, A, B, C, method):
    return tuple(x.new_empty(x.shape) for x in (u, dt, A, B, C))


def _scan_context(ctx, inputs, output):
    *tensors, ctx.method = inputs
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx, grad_y, grad_last):
    gradients = scan_rows_backward(
        grad_y.contiguous(), grad_last.contiguous(), *ctx.saved_tensors, ctx.method
    )
    return (*gradients, None)


scan_rows.register_autograd(_scan_gradients, setup_context=_scan_context)
