"""Layer norm over the channels of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    GeometryError,
    describe,
)
from segmamba.ops._differentiable import differentiable, direct_or
from segmamba.ops.backends import why_not_on

_BACKENDS = ("auto", "reference", "cuda")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 2048


def token_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Normalise each token over its channels, then scale and shift the channels.

    The mean becomes 0 and the (biased) variance 1, both found in float32.

    Args:
        x: Tokens, (B, L, C).
        weight: Scale of each channel, (C,).
        bias: Shift of each channel, (C,).
        eps: Added to the variance.
        backend: "auto", "reference" (PyTorch) or "cuda" (one read and one write, on a
            GPU; within autocast the result has autocast's type at once, and the
            backward keeps x alone).

    Returns:
        Tokens of x's shape.

    Raises:
        ConfigError: The back end is unknown.
        GeometryError: Weight or bias has another shape.
        BackendUnavailableError: The named back end can't run this.
    """
    if backend not in _BACKENDS:
        raise ConfigError(
            describe(
                "unknown back end of the token norm",
                expected="one of " + ", ".join(map(repr, _BACKENDS)),
                found=repr(backend),
            )
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise GeometryError(
            describe(
                "weight and bias do not fit the tokens",
                expected=tuple(x.shape[-1:]),
                found=f"{tuple(weight.shape)} and {tuple(bias.shape)}",
            )
        )
    if not _takes_cuda(x, weight, bias, backend):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _token_norm(x.contiguous(), weight, bias, float(eps), _result_type(x))


def _takes_cuda(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> bool:
    if backend == "reference" or (backend == "auto" and not x.is_cuda):
        return False
    reason = _why_not_cuda(x, weight, bias)
    if reason and backend == "cuda":
        raise BackendUnavailableError(
            describe(
                f"the cuda back end can't run this: {reason}",
                remedy='Use backend="auto" or backend="reference".',
            )
        )
    return not reason


def _why_not_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    types = x.dtype in _TYPES and weight.dtype in _TYPES and _result_type(x) in _TYPES
    if not types or bias.dtype != weight.dtype:
        return "it takes float32, bfloat16 and float16"
    if x.shape[-1] > _MAX_CHANNELS:
        return f"it takes at most {_MAX_CHANNELS} channels"
    return why_not_on(x.device)


def _result_type(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


# --- the fused one --------------------------------------------------------------------


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    from segmamba.ops._cuda import token_norm as kernels

    return kernels.token_norm(x, weight, bias, eps, dtype)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from segmamba.ops._cuda import token_norm as kernels

    return kernels.token_norm_backward(grad, x, weight, eps)


@torch.library.custom_op("segmamba::token_norm", mutates_args=())
def fused_token_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise tokens; as `_cuda.token_norm.token_norm`."""
    return _forward(x, weight, bias, eps, dtype)


@fused_token_norm.register_fake
def _(x, weight, bias, eps, dtype):
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("segmamba::token_norm_backward", mutates_args=())
def fused_token_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `token_norm`; as `_cuda.token_norm.token_norm_backward`."""
    return _backward(grad, x, weight, eps)


@fused_token_norm_backward.register_fake
def _(grad, x, weight, eps):
    return torch.empty_like(x), weight.new_empty(2, *weight.shape)


_token_norm_backward = direct_or(fused_token_norm_backward, _backward)


def _context(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, others = _token_norm_backward(grad.contiguous(), x, weight, ctx.eps)
    return grad_x, *others.unbind(), None, None


_token_norm = differentiable(fused_token_norm, _forward, _context, _gradients)
