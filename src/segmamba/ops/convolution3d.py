"""Convolution of 3x3x3 voxels, faster than cuDNN's where a network spends its time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.ops._differentiable import differentiable, direct_or
from segmamba.ops.backends import constant_for_compilers, why_not_on

FEWEST_VOXELS = 100_000
"""Of a batch: smaller maps cuDNN convolves in no time."""
MOST_LAUNCHES = 4
"""Launches of an input and its weights; more of them cuDNN does as fast."""
GOOD_FOR_CUDNN = 64
"""Of multiples of this many channels cuDNN is fast."""

_CHANNELS_LAST = torch.channels_last_3d
_HALVES = (torch.bfloat16, torch.float16)


def conv3d(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """Convolve with a kernel of 3x3x3, stride 1 and padding 1, in the autocast's type.

    On GPUs of compute capability 9.0, in half precision and channels-last memory, a
    kernel of ours does it where that is faster than cuDNN. Its sums are float32; those
    of more than 48 input channels, or of two inputs, are rounded once for each part.

    Args:
        x: Features, (B, C, D, H, W).
        weight: Kernel, (O, C, 3, 3, 3), or (O, C + C', 3, 3, 3).
        other: Features whose channels follow x's, (B, C', D, H, W); they needn't be
            joined to them in memory.

    Returns:
        Features, (B, O, D, H, W).
    """
    if not _takes_kernel(x, weight, other):
        whole = x if other is None else torch.cat((x, other), dim=1)
        return F.conv3d(whole, weight, padding=1)
    dtype = _autocast_type(x)
    other = None if other is None else other.to(dtype)
    return _convolve(x.to(dtype), weight, other)


def convolves_parts(x: Tensor, weight: Tensor, other: Tensor) -> bool:
    """Say whether `conv3d` convolves two inputs without joining them in memory.

    Args:
        x: Features, as for `conv3d`.
        weight: Kernel.
        other: Features whose channels follow x's.
    """
    return _takes_kernel(x, weight, other)


def _autocast_type(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    )


# --- whether the kernel does it -------------------------------------------------------


def _takes_kernel(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    inputs = [x] if other is None else [x, other]
    return (
        not why_not_on(x.device)
        and _is_hopper(x.device)
        and _autocast_type(x) in _HALVES
        and x.numel() // x.shape[1] >= FEWEST_VOXELS
        and all(t.is_contiguous(memory_format=_CHANNELS_LAST) for t in inputs)
        and weight.shape[2:] == (3, 3, 3)
        and all(_pays(t.shape[1], weight.shape[0]) for t in inputs)
    )


@constant_for_compilers
def _pays(inputs: int, outputs: int) -> bool:
    """Whether the kernel does these channels, and faster than cuDNN."""
    from segmamba.ops._cuda.conv3d import launches

    if inputs % GOOD_FOR_CUDNN == 0 and outputs % GOOD_FOR_CUDNN == 0:
        return False
    return 0 < launches(inputs, outputs) <= MOST_LAUNCHES


@constant_for_compilers
def _is_hopper(device: torch.device) -> bool:
    """Whether a GPU has the instructions; where kernels are emulated, all are there."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) == (9, 0)


# --- for operators that convolve among other things -----------------------------------


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve as `conv3d` does, in x's type, and unseen by autograd.

    Args:
        x: Features.
        weight: Kernel, of any type.
    """
    with torch.autocast(x.device.type, enabled=False):
        if _takes_kernel(x, weight, None):
            return _forward(x, weight, None)
        return F.conv3d(x, weight.to(x.dtype), padding=1)


def convolution_gradients(
    grad: Tensor, x: list[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate `convolve`.

    Args:
        grad: Of the result.
        x: The features alone; taken out of the list, and freed as soon as can be.
        weight: Kernel, of any type.

    Returns:
        Gradients of the features and of the kernel.
    """
    features = x.pop()
    with torch.autocast(features.device.type, enabled=False):
        if not _takes_kernel(features, weight, None):
            of_x, of_weight = _gradients_by_torch(grad, features, weight)
            return of_x, of_weight.to(weight.dtype)
        grad = grad.contiguous(memory_format=_CHANNELS_LAST)
        of_weight = _weight_gradient(grad, features, None).to(weight.dtype)
        del features
        return _input_gradients(grad, weight, weight.shape[1])[0], of_weight


def _gradients_by_torch(
    grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    ones = [1, 1, 1]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *(grad, x, weight.to(x.dtype), None, ones, ones, ones, False, [0, 0, 0], 1),
        [True, True, False],
    )
    return of_x, of_weight


# --- operators ------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    from segmamba.ops._cuda import conv3d

    return conv3d.convolve(x, weight, other)


def _input_gradients(
    grad: Tensor, weight: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    from segmamba.ops._cuda import conv3d

    return conv3d.input_gradients(grad, weight, channels)


def _weight_gradient(grad: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    from segmamba.ops._cuda import conv3d

    return conv3d.weight_gradient(grad, x, other)


@torch.library.custom_op("segmamba::conv3d", mutates_args=())
def fused_conv3d(x: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    """Convolve; as `_cuda.conv3d.convolve`."""
    return _forward(x, weight, other)


@fused_conv3d.register_fake
def _(x, weight, other):
    return _channels_last_like(x, weight.shape[0])


@torch.library.custom_op("segmamba::conv3d_input_gradients", mutates_args=())
def conv3d_input_gradients(
    grad: Tensor, weight: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the features; as `_cuda.conv3d.input_gradients`."""
    return _input_gradients(grad, weight, channels)


@conv3d_input_gradients.register_fake
def _(grad, weight, channels):
    rest = weight.shape[1] - channels
    found = _channels_last_like(grad, channels)
    return found, _channels_last_like(grad, rest) if rest else grad.new_empty(0)


@torch.library.custom_op("segmamba::conv3d_weight_gradient", mutates_args=())
def conv3d_weight_gradient(grad: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    """Gradient of the kernel in float32; as `_cuda.conv3d.weight_gradient`."""
    return _weight_gradient(grad, x, other)


@conv3d_weight_gradient.register_fake
def _(grad, x, other):
    channels = x.shape[1] + (0 if other is None else other.shape[1])
    shape = grad.shape[1], channels, 3, 3, 3
    return torch.empty(
        shape, dtype=torch.float32, device=x.device, memory_format=_CHANNELS_LAST
    )


def _channels_last_like(x: Tensor, channels: int) -> Tensor:
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST
    )


# --- gradients ------------------------------------------------------------------------


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    x, weight, other = ctx.saved_tensors
    for_x, for_weight, for_other = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=_CHANNELS_LAST)
    grad_x = grad_other = grad_weight = None
    if for_x or for_other:
        grad_x, grad_other = _input_gradients_op(grad, weight, x.shape[1])
    if for_weight:
        grad_weight = _weight_gradient_op(grad, x, other).to(weight.dtype)
    return grad_x, grad_weight, None if other is None else grad_other


_input_gradients_op = direct_or(conv3d_input_gradients, _input_gradients)
_weight_gradient_op = direct_or(conv3d_weight_gradient, _weight_gradient)
_convolve = differentiable(fused_conv3d, _forward, _context, _gradients)
