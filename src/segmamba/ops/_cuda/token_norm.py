"""Launches of the token norm's kernels; see `token_norm.cu`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel

MOST_CHANNELS = 2048
"""A token stays in the registers of a warp."""
RESIDENT = 2
"""Blocks of the backward for each multiprocessor: as many as it holds at a time."""

_THREADS, _WARP = 256, 32
_MOST_VECTORS = 8
"""Vectors of a thread, where more threads could do them."""

_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def lanes_for(vectors: int) -> int:
    """Choose how many threads do a token: a power of two up to 32.

    Args:
        vectors: Vectors of a token; the threads share them evenly if they can.
    """
    evenly = vectors & -vectors
    if evenly >= _WARP or vectors <= evenly * _MOST_VECTORS:
        return min(evenly, _WARP)
    return min(_WARP, 1 << (vectors - 1).bit_length())


@functools.cache
def _blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return RESIDENT
    found = torch.cuda.get_device_properties(device)
    return RESIDENT * found.multi_processor_count


def _kernel(name: str, weight: Tensor, *tensors: Tensor) -> tuple[Kernel, int]:
    """A kernel for x, the result or its gradient, others; and tokens of a block."""
    x, result, *_ = tensors
    channels, most = x.shape[-1], 8 if x.element_size() == 2 else 4
    if any(t.data_ptr() % 16 for t in (weight, *tensors)):
        most = 1
    vector = next(v for v in (8, 4, 1) if v <= most and channels % v == 0)
    lanes = lanes_for(channels // vector)
    types = zip(
        ("X", "Y", "WEIGHT"), (x.dtype, result.dtype, weight.dtype), strict=True
    )
    names = {letter: _NAMES[dtype] for letter, dtype in types}
    sizes = {"CHANNELS": channels, "VEC": vector, "LANES": lanes}
    run = kernel("token_norm.cu", name, x.device, **names, **sizes)
    return run, _THREADS // lanes


def token_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise tokens over their channels, then scale and shift.

    Args:
        x: Contiguous, (..., C), of float32, bfloat16 or float16.
        weight: (C,), of any of these types.
        bias: As weight.
        eps: Added to the variance.
        dtype: The result's type.

    Returns:
        As x.
    """
    out = torch.empty_like(x, dtype=dtype)
    run, each = _kernel("token_norm", weight, x, out, bias)
    tokens = x.numel() // x.shape[-1]
    blocks = -(-tokens // each)
    run((blocks, 1, 1), _THREADS, x, weight, bias, out, tokens, eps)
    return out


def token_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `token_norm`.

    Args:
        grad: Of the result, contiguous.
        x: As given to `token_norm`.
        weight: As given to `token_norm`.
        eps: As given to `token_norm`.

    Returns:
        Gradients of x, and of weight and bias in one, (2, C); in x's and weight's type.
    """
    grad_x, channels = torch.empty_like(x), x.shape[-1]
    run, each = _kernel("token_norm_back", weight, x, grad, grad_x)
    tokens = x.numel() // channels
    blocks = min(_blocks(x.device), -(-tokens // each))
    shape = blocks, 2, channels
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    arguments = grad, x, weight, grad_x, parts, tokens, eps
    run((blocks, 1, 1), _THREADS, *arguments)
    return grad_x, parts.sum(0).to(weight.dtype)
