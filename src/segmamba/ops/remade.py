"""Pairs of an instance norm and a convolution that keep less for their backward.

What lies between the two costs little to make and as much memory as anything else. So
it isn't kept: the backward makes it again, by the same operations, with the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from segmamba.ops import norm
from segmamba.ops._differentiable import is_traced
from segmamba.ops.convolution3d import convolution_gradients, convolve


def remakes(x: Tensor, weight: Tensor) -> bool:
    """Say whether the operators of this module run, rather than the two of each pair.

    They do where autograd records and the instance norm has its kernels: on a GPU. A
    compiler gets the pairs, for it decides by itself what to keep.

    Args:
        x: What is normed, of the type in which it shall be convolved.
        weight: Kernel of the convolution.
    """
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and norm.has_kernels_for(x)
        and not is_traced((x, weight))
        and x.dtype == _convolved_type(x, weight)
    )


def _convolved_type(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def norm_conv3d(
    x: Tensor, weight: Tensor, *, activation: str, eps: float = 1e-5
) -> Tensor:
    """Give conv3d(instance_norm(x, activation=activation), weight), where `remakes`.

    The backward keeps x, the statistics and the weight.

    Args:
        x: Features, (B, C, D, H, W), channels-last.
        weight: Kernel, (O, C, 3, 3, 3).
        activation: "relu" or "leaky_relu".
        eps: Added to the variance.

    Returns:
        Features, (B, O, D, H, W).
    """
    return _NormConvolution.apply(x, weight, norm.negative_slope(activation), eps)


class _NormConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, slope: float, eps: float
    ) -> Tensor:
        normed, stats = norm.norm_forward(x, None, 0, slope, eps)
        ctx.save_for_backward(x, weight, stats)
        ctx.slope, ctx.eps = slope, eps
        return convolve(normed, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, stats = ctx.saved_tensors
        normed = [norm.norm_again(x, stats, ctx.slope, ctx.eps)]
        grad, of_weight = convolution_gradients(grads[0], normed, weight)
        of_x, _ = norm.norm_backward(grad, x, None, stats, 0, ctx.slope)
        return of_x, of_weight, None, None


def project_voxels(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """Convolve single voxels.

    Args:
        x: Features, (B, C, D, H, W).
        weight: Kernel, (O, C, 1, 1, 1), or (O, C + C', 1, 1, 1).
        other: Features whose channels follow x's, (B, C', D, H, W); they needn't be
            joined to them in memory.

    Returns:
        Features, (B, O, D, H, W).
    """
    if other is None:
        return F.conv3d(x, weight)
    first, second = weight.flatten(1).split([x.shape[1], other.shape[1]], dim=1)
    voxels = x.permute(0, 2, 3, 4, 1)
    others = other.permute(0, 2, 3, 4, 1).reshape(-1, other.shape[1])
    rows = F.linear(voxels.reshape(-1, x.shape[1]), first)
    rows = torch.addmm(rows, others, second.t())
    return rows.view(*voxels.shape[:-1], -1).permute(0, 4, 1, 2, 3)


def norm_project(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None = None,
    *,
    activation: str,
    eps: float = 1e-5,
) -> Tensor:
    """Give act(norm(y) + norm(project_voxels(x, weight, other))), where `remakes`.

    The backward keeps y, x, the other and the weight.

    Args:
        y: Features, (B, O, D, H, W), channels-last.
        x: As for `project_voxels`; so are weight and other.
        weight: See x.
        other: See x.
        activation: "relu" or "leaky_relu".
        eps: Added to the variance.

    Returns:
        Features, (B, O, D, H, W).
    """
    slope = norm.negative_slope(activation)
    return _NormProjection.apply(y, slope, eps, x, weight, other)


class _NormProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        slope: float,
        eps: float,
        x: Tensor,
        weight: Tensor,
        other: Tensor | None,
    ) -> Tensor:
        shortcut = _project_in(y.dtype, x, weight, other)
        out, stats = norm.norm_forward(y, shortcut, norm.NORMED, slope, eps)
        ctx.save_for_backward(y, stats, x, weight, other)
        ctx.slope = slope
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        y, stats, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        leaves: list[Any] = [None if t is None else t.detach() for t in inputs]
        for leaf, one in zip(leaves, needed, strict=True):
            if leaf is not None:
                leaf.requires_grad_(one)
        with torch.enable_grad():
            made = _project_in(y.dtype, *leaves)
        edge, shortcut = get_gradient_edge(made), made.detach()
        rest = stats, norm.NORMED, ctx.slope
        of_y, grad = norm.norm_backward(grads[0], y, shortcut, *rest)
        del made, shortcut  # before the gradients of what they were made of
        wanted = [leaf for leaf, one in zip(leaves, needed, strict=True) if one]
        found = iter(torch.autograd.grad(edge, wanted, grad))
        return of_y, None, None, *(next(found) if one else None for one in needed)


def _project_in(
    dtype: torch.dtype, x: Tensor, weight: Tensor, other: Tensor | None
) -> Tensor:
    """Project in a type, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        other = None if other is None else other.to(dtype)
        shortcut = project_voxels(x.to(dtype), weight.to(dtype), other)
    return shortcut.contiguous(memory_format=torch.channels_last_3d)
