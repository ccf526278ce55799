"""Instance norm, with the activation and the addition that follow it."""

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

SLOPE = 0.01
"""Negative slope of the leaky ReLU."""

_ACTIVATIONS = (None, "relu", "leaky_relu")
_JOINS = ("before", "normed", "after")
NORMED, _AFTER = 2, 3
"""Numbers of joins for the operators below; 0 is no residual."""

_BACKENDS = ("auto", "reference", "cuda")
_CHANNELS_LAST = torch.channels_last_3d
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 4096


def instance_norm(
    x: Tensor,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    join: str = "before",
    slope: float = SLOPE,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Normalise each channel of each case over space, then activate.

    The mean becomes 0 and the (biased) variance 1. With a residual r, the result is,
    by `join`,

    - "before": act(norm(x) + r),
    - "normed": act(norm(x) + norm(r)),
    - "after": act(norm(x)) + r.

    Args:
        x: Features, (B, C, D, H, W), of more than one voxel.
        activation: None, "relu" or "leaky_relu".
        residual: Features of x's shape to add, or None.
        join: How the residual is added; see above.
        slope: Negative slope of the leaky ReLU.
        eps: Added to the variance.
        backend: "auto", "reference" (PyTorch) or "cuda" (one read for the statistics,
            one read and one write for the rest, of channels-last tensors on a GPU; its
            backward keeps x and the residual only).

    Returns:
        Features of x's shape, type (the wider one, if the residual's is wider) and
        memory format.

    Raises:
        ConfigError: The activation, join or back end is unknown.
        GeometryError: x isn't a batch of volumes, or the residual has another shape.
        BackendUnavailableError: The named back end can't run this.
    """
    _check_names(activation, join, backend)
    _check_shapes(x, residual)
    if not _takes_cuda(x, residual, backend):
        return _reference(x, activation, residual, join, slope, eps)
    factor = negative_slope(activation, slope)
    code = 0 if residual is None else 1 + _JOINS.index(join)
    if residual is not None:
        residual = residual.contiguous(memory_format=_CHANNELS_LAST)
    return _fused_norm(x, residual, code, factor, float(eps))[0]


def negative_slope(activation: str | None, slope: float = SLOPE) -> float:
    """Give the slope below 0 of a known activation; `slope` is the leaky ReLU's."""
    return {None: 1.0, "relu": 0.0, "leaky_relu": float(slope)}[activation]


def has_kernels_for(x: Tensor) -> bool:
    """Say whether an instance norm of x on its own is done by kernels of ours."""
    return x.is_cuda and not _why_not_cuda(x, None)


def _check_names(activation: str | None, join: str, backend: str) -> None:
    for what, value, known in (
        ("activation", activation, _ACTIVATIONS),
        ("join", join, _JOINS),
        ("back end of the instance norm", backend, _BACKENDS),
    ):
        if value not in known:
            raise ConfigError(
                describe(
                    f"unknown {what}",
                    expected="one of " + ", ".join(map(repr, known)),
                    found=repr(value),
                )
            )


def _check_shapes(x: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 5:
        raise GeometryError(
            describe(
                "an instance norm takes a batch of volumes",
                expected="(B, C, D, H, W)",
                found=tuple(x.shape),
            )
        )
    if residual is not None and residual.shape != x.shape:
        raise GeometryError(
            describe(
                "the residual does not fit the features",
                expected=tuple(x.shape),
                found=tuple(residual.shape),
            )
        )


# --- the reference --------------------------------------------------------------------


def _reference(
    x: Tensor,
    activation: str | None,
    residual: Tensor | None,
    join: str,
    slope: float,
    eps: float,
) -> Tensor:
    y = _normalised(x, eps)
    if residual is not None and join != "after":
        y = _add(y, _normalised(residual, eps) if join == "normed" else residual)
    if activation == "relu":
        y = F.relu(y, inplace=True)
    if activation == "leaky_relu":
        y = F.leaky_relu(y, slope, inplace=True)
    return _add(y, residual) if residual is not None and join == "after" else y


def _add(y: Tensor, other: Tensor) -> Tensor:
    """Add into y where no gradient is asked for: one map less is in memory then."""
    if y.requires_grad or other.requires_grad:
        return y + other
    same_type = torch.promote_types(y.dtype, other.dtype) == y.dtype
    return y.add_(other) if same_type else y + other


def _normalised(x: Tensor, eps: float) -> Tensor:
    if x.is_contiguous() or not x.is_contiguous(memory_format=_CHANNELS_LAST):
        return F.group_norm(x, x.shape[1], eps=eps)
    return _normalised_channels_last(x, eps)


def _normalised_channels_last(x: Tensor, eps: float) -> Tensor:
    """Normalise each case as a batch of voxels, the fast way on channels-last.

    Group norm's backward is up to ten times slower there. The voxels go in as rows,
    for torch 2.13's backward of a batch norm over volumes is wrong where the stride of
    a batch of one is unusual (tests/ops/test_norm.py shows it).
    """
    batch, channels, *size = x.shape
    rows = x.permute(0, 2, 3, 4, 1).reshape(batch, -1, channels)
    cases = [
        F.batch_norm(case, None, None, training=True, eps=eps) for case in rows.unbind()
    ]
    normed = cases[0].unsqueeze(0) if batch == 1 else torch.stack(cases)
    return normed.view(batch, *size, channels).permute(0, 4, 1, 2, 3)


# --- the fused one --------------------------------------------------------------------


def _takes_cuda(x: Tensor, residual: Tensor | None, backend: str) -> bool:
    if backend == "reference" or (backend == "auto" and not x.is_cuda):
        return False
    reason = _why_not_cuda(x, residual)
    if reason and backend == "cuda":
        raise BackendUnavailableError(
            describe(
                f"the cuda back end can't run this: {reason}",
                remedy='Use backend="auto" or backend="reference".',
            )
        )
    return not reason


def _why_not_cuda(x: Tensor, residual: Tensor | None) -> str:
    if x.dtype not in _TYPES or (residual is not None and residual.dtype not in _TYPES):
        return "it takes float32, bfloat16 and float16"
    if not x.is_contiguous(memory_format=_CHANNELS_LAST):
        return "it needs features in torch.channels_last_3d"
    if x.shape[1] > _MAX_CHANNELS:
        return f"it takes at most {_MAX_CHANNELS} channels"
    return why_not_on(x.device)


def _result_type(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def norm_forward(
    x: Tensor, residual: Tensor | None, join: int, slope: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise, join a residual, activate; as `_cuda.norm.norm`."""
    from segmamba.ops._cuda import norm

    return norm.norm(x, residual, join, slope, eps, _result_type(x, residual))


def norm_again(x: Tensor, stats: Tensor, slope: float, eps: float) -> Tensor:
    """Give the result for x alone again; as `_cuda.norm.norm_again`."""
    from segmamba.ops._cuda import norm

    return norm.norm_again(x, stats, slope, eps)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    join: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `norm_forward`; as `_cuda.norm.norm_backward`."""
    from segmamba.ops._cuda import norm

    grad = grad.contiguous(memory_format=_CHANNELS_LAST)
    return norm.norm_backward(grad, x, residual, stats, join, slope)


@torch.library.custom_op("segmamba::fused_norm", mutates_args=())
def fused_norm(
    x: Tensor, residual: Tensor | None, join: int, slope: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise, join a residual, activate; as `_cuda.norm.norm`."""
    return norm_forward(x, residual, join, slope, eps)


@fused_norm.register_fake
def _(x, residual, join, slope, eps):
    kinds = 4 if join == NORMED else 2
    stats = x.new_empty((*x.shape[:1], kinds, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x, dtype=_result_type(x, residual)), stats


@torch.library.custom_op("segmamba::fused_norm_backward", mutates_args=())
def fused_norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    join: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `fused_norm`; as `_cuda.norm.norm_backward`."""
    return norm_backward(grad, x, residual, stats, join, slope)


@fused_norm_backward.register_fake
def _(grad, x, residual, stats, join, slope):
    empty = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x), empty


_fused_norm_backward = direct_or(fused_norm_backward, norm_backward)


def _norm_context(ctx, inputs, output):
    x, residual, ctx.join, ctx.slope, _ = inputs
    after = residual if ctx.join == _AFTER else None
    ctx.after_type = None if after is None else after.dtype
    ctx.save_for_backward(x, residual if after is None else None, output[1])
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx, grad, _):
    x, residual, stats = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_CHANNELS_LAST)
    grad_x, grad_residual = _fused_norm_backward(
        grad, x, residual, stats, ctx.join, ctx.slope
    )
    if ctx.join == _AFTER:
        return grad_x, grad.to(ctx.after_type), None, None, None
    return grad_x, None if residual is None else grad_residual, None, None, None


_fused_norm = differentiable(fused_norm, norm_forward, _norm_context, _norm_gradients)
