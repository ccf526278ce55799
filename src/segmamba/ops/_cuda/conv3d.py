"""Launches of the convolution's kernels; see `conv3d.cu`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from segmamba.ops._cuda.compiler import Kernel, kernel

TAPS = 27

_TALL, _WIDE, _DEEP = 8, 16, 2
"""Voxels that a block does at a time, along H, W and D."""
_SHARED = 227 * 1024
_INPUTS = (48, 32, 24, 16, 8, 4)
_OUTPUTS = (64, 48, 32, 16)
"""Channels of a launch."""
_INPUTS_OF_GRADIENT = (48, 32, 16, 8, 4)
"""The same for the gradient of the weights."""

_KINDS = {torch.bfloat16: 1, torch.float16: 2}
_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- which channels a launch does -----------------------------------------------------


def _planes(inputs: int) -> int:
    """Planes of eight channels: pairs of them are the terms of a product."""
    return -(-inputs // 16) * 2


def _shared(inputs: int, outputs: int) -> int:
    """Bytes of shared memory: six slices with their borders, and the weights."""
    border = (_TALL + 2) * (_WIDE + 2) + 1
    return 16 * _planes(inputs) * (6 * border + TAPS * outputs)


def _shared_of_gradient(inputs: int, outputs: int) -> int:
    """The same for the gradient of the weights: five and nine slices."""
    gradient = 5 * (outputs // 8) * (_TALL * _WIDE + 1)
    return 16 * (gradient + 9 * -(-inputs // 8) * (_TALL * (_WIDE + 2) + 1))


@functools.cache
def pieces(inputs: int, outputs: int) -> tuple[int, int] | None:
    """Choose the channels of a launch.

    Args:
        inputs: Input channels of the convolution.
        outputs: Its output channels.

    Returns:
        Input and output channels that divide the convolution's and fit into a launch,
        for the least time; None if there are none.
    """
    found = [
        (inputs // n * (outputs // m) * _planes(n) * (16 + m // 4), -n, -m)
        for n in _INPUTS
        for m in _OUTPUTS
        if inputs % n == 0 and outputs % m == 0 and _shared(n, m) <= _SHARED
        if n > 4 or inputs == 4
    ]  # by the bytes that products read from shared memory
    if not found:
        return None
    _, n, m = min(found)
    return -n, -m


def launches(inputs: int, outputs: int) -> int:
    """Say how many launches a convolution takes; 0 if it can't be done.

    Args:
        inputs: Input channels.
        outputs: Output channels.
    """
    inputs = _aligned_channels(inputs)
    sizes = pieces(inputs, outputs)
    return 0 if sizes is None else inputs // sizes[0] * (outputs // sizes[1])


def _aligned_channels(channels: int) -> int:
    """Channels with which a voxel takes whole copies: few are filled up with zeros."""
    return 4 if channels < 4 else 8 if 4 < channels < 8 else channels


def _aligned(x: Tensor) -> Tensor:
    channels = _aligned_channels(x.shape[1])
    if channels != x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, channels - x.shape[1]))
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return x.clone() if x.data_ptr() % 16 else x


# --- what callers call ----------------------------------------------------------------


def convolve(x: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    """Convolve with padding 1.

    Args:
        x: Channels-last features in half precision, (B, C, D, H, W).
        weight: Kernel of any precision, (O, C + C', 3, 3, 3).
        other: More of them, whose channels follow x's, (B, C', D, H, W), or None.

    Returns:
        Channels-last features, (B, O, D, H, W).
    """
    y = _empty(x, weight.shape[0])
    first = x.shape[1]
    _convolve_piecewise(x, weight[:, :first], y, flip=False, add=False)
    if other is not None:
        _convolve_piecewise(other, weight[:, first:], y, flip=False, add=True)
    return y


def input_gradients(
    grad: Tensor, weight: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `convolve`'s features.

    Args:
        grad: Of its result, channels-last, (B, O, D, H, W).
        weight: Its kernel.
        channels: C of its first features.

    Returns:
        Gradients of the first and of the others; empty if there are no others.
    """
    first = _input_gradient(grad, weight[:, :channels])
    if weight.shape[1] == channels:
        return first, grad.new_empty(0)
    return first, _input_gradient(grad, weight[:, channels:])


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    if pieces(grad.shape[1], weight.shape[1]) is None:
        return _input_gradient_by_torch(grad, weight)
    found = _empty(grad, weight.shape[1])
    _convolve_piecewise(grad, weight.transpose(0, 1), found, flip=True, add=False)
    return found


def _input_gradient_by_torch(grad: Tensor, weight: Tensor) -> Tensor:
    x = _empty(grad, weight.shape[1])
    ones = [1, 1, 1]
    found, _, _ = torch.ops.aten.convolution_backward(
        *(grad, x, weight.to(grad.dtype), None, ones, ones, ones, False, [0, 0, 0], 1),
        [True, False, False],
    )
    return found.contiguous(memory_format=torch.channels_last_3d)


def weight_gradient(grad: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    """Give the gradient of `convolve`'s kernel.

    Args:
        grad: Of its result, channels-last, (B, O, D, H, W).
        x: Its first features.
        other: Its other features, or None.

    Returns:
        (O, C + C', 3, 3, 3), float32, channels-last.
    """
    inputs = [_aligned(t) for t in (x, other) if t is not None]
    sizes = [t.shape[1] for t in (x, other) if t is not None]
    found = torch.empty(
        (grad.shape[1], sum(map(_aligned_channels, sizes)), 3, 3, 3),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last_3d,
    )
    parts = found.split([t.shape[1] for t in inputs], dim=1)
    for source, part in zip(inputs, parts, strict=True):
        _differentiate_piecewise(_aligned(grad), source, part)
    kept = [part[:, :size] for part, size in zip(parts, sizes, strict=True)]
    if sum(sizes) == found.shape[1]:
        return found
    return torch.cat(kept, 1).contiguous(memory_format=torch.channels_last_3d)


def _empty(like: Tensor, channels: int) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, *like.shape[2:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last_3d,
    )


# --- launches -------------------------------------------------------------------------


def _convolve_piecewise(
    x: Tensor, weight: Tensor, y: Tensor, *, flip: bool, add: bool
) -> None:
    """Convolve; later pieces of the input add to what is in y."""
    x, outputs = _aligned(x), y.shape[1]
    sizes = pieces(x.shape[1], outputs)
    assert sizes is not None
    n, m = sizes
    for output in range(0, outputs, m):
        for first in range(0, x.shape[1], n):
            part = weight[output : output + m, first : first + n]
            packed = _pack(part, n, x.dtype, flip)
            _convolve_piece(x, first, n, packed, y, output, m, add or first > 0)


def _pack(weight: Tensor, inputs: int, dtype: torch.dtype, flip: bool) -> Tensor:
    """Lay a piece's weights out for the kernel, taps reversed if `flip`."""
    outputs, planes = weight.shape[0], _planes(inputs)
    packed = torch.empty(TAPS * planes * outputs * 8, dtype=dtype, device=weight.device)
    kinds = {"KIND": _KINDS[dtype], "WEIGHT": _NAMES[weight.dtype]}
    run = kernel("conv3d_weights.cu", "pack_weights", weight.device, **kinds)
    sizes = weight.shape[1], planes, outputs
    strides = weight.stride(1), weight.stride(0), weight.stride(4)
    blocks = -(-packed.numel() // 256)
    run((blocks, 1, 1), 256, weight, packed, *sizes, *strides, int(flip))
    return packed


def _convolve_piece(
    x: Tensor,
    first: int,
    inputs: int,
    packed: Tensor,
    y: Tensor,
    output: int,
    outputs: int,
    add: bool,
) -> None:
    kinds = {"KIND": _KINDS[x.dtype], "CIN": inputs, "N": outputs, "ADD": int(add)}
    run = kernel("conv3d.cu", "conv3d", x.device, **kinds)
    batch, channels, *size = x.shape
    blocks = min(_multiprocessors(x.device), _columns(x) * -(-size[0] // _DEEP))
    run(
        (blocks, 1, 1),
        256,
        *(x[:, first:], packed, y[:, output:], batch, *size, channels, y.shape[1]),
        shared=_shared(inputs, outputs),
    )


def _columns(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[3] // _TALL) * -(-x.shape[4] // _WIDE)


def _differentiate_piecewise(grad: Tensor, x: Tensor, found: Tensor) -> None:
    """Write the gradient of the weights of x to `found`, (O, C, 3, 3, 3)."""
    n = next(n for n in _INPUTS_OF_GRADIENT if x.shape[1] % n == 0)
    m = next(m for m in _OUTPUTS if grad.shape[1] % m == 0)
    for output in range(0, grad.shape[1], m):
        for first in range(0, x.shape[1], n):
            part = found[output : output + m, first : first + n]
            _differentiate_piece(x, first, grad, output, part)


def _differentiate_piece(
    x: Tensor, first: int, grad: Tensor, output: int, found: Tensor
) -> None:
    def run_for(name: str) -> Kernel:
        return kernel("conv3d_weight_gradient.cu", name, x.device, **kinds)

    outputs, inputs = found.shape[:2]
    kinds = {"KIND": _KINDS[x.dtype], "CIN": inputs, "N": outputs}
    groups = min(max(1, _multiprocessors(x.device) // 3), _columns(x) * x.shape[2])
    size = 9 * outputs * 3 * -(-inputs // 8) * 8
    parts = torch.empty(groups * size, dtype=torch.float32, device=x.device)
    batch, channels, *sides = x.shape
    run_for("sum_products")(
        (3 * groups, 1, 1),
        384,
        *(x[:, first:], grad[:, output:], parts, batch, *sides),
        *(channels, grad.shape[1]),
        shared=_shared_of_gradient(inputs, outputs),
    )
    strides = found.stride(0), found.stride(1), found.stride(4)
    run_for("sum_parts")((-(-size // 256), 1, 1), 256, parts, found, groups, *strides)
