"""How much memory a network should take, from its shape alone."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch

from segmamba.config import NetworkConfig
from segmamba.types import Size3

MIB = 2**20
DEFAULT_MEMORY_MIB = 8 * 1024.0
"""Target where the device doesn't say what it has."""
USABLE_SHARE = 0.9
"""Share of a GPU's memory that a training step may fill."""

# docs/concepts/plan.md says how these were measured. Copies of one tensor of
# (channels, voxels) that a training step holds for each part of the network:
_BLOCK_COPIES = 9.0  # a residual block, or a decoder step with its concatenation
_GSC_COPIES = 12.0  # a gated spatial convolution (four units)
_MAMBA_COPIES = 26.0  # a Mamba layer with its norm and three directions
_PREDICTION_COPIES = 6.0  # of the largest level, alive at once without gradients
_STATE_COPIES = 4  # weights, gradients, momentum, moving average


def device_memory_mib(device: str) -> float:
    """Give the memory that planning may fill.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        MiB: nine tenths of the GPU's memory if it is there, otherwise 8 GiB, so that
        plans for CPUs are the same everywhere.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.device(device)).total_memory
        return USABLE_SHARE * total / MIB
    return DEFAULT_MEMORY_MIB


def training_memory_mib(
    network: NetworkConfig,
    patch_size: Size3,
    batch_size: int,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> float:
    """Estimate the peak memory of a training step.

    Args:
        network: A configuration with its strides and channels.
        patch_size: Voxels along (D, H, W).
        batch_size: Patches in a batch.
        precision: Type of the activations.

    Returns:
        MiB for weights, gradients, optimiser and activations; the interpreter's own
        memory isn't in it. Within about 30 % of what was measured.
    """
    copies = sum(
        count * channels * voxels
        for count, channels, voxels in _parts(network, patch_size)
    )
    image = network.in_channels + 4 * network.out_channels
    copies += image * math.prod(patch_size)
    size = 4 if precision == "fp32" else 2
    states = 4 * _STATE_COPIES * count_weights(network)
    return (states + batch_size * size * copies) / MIB


def prediction_memory_mib(
    network: NetworkConfig,
    patch_size: Size3,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> float:
    """Estimate the peak memory of one window's forward pass, without gradients.

    Args:
        network: A configuration with its strides and channels.
        patch_size: Voxels of the window along (D, H, W).
        precision: Type of the activations.

    Returns:
        MiB for weights and activations.
    """
    size = 4 if precision == "fp32" else 2
    largest = max(
        channels * voxels for _, channels, voxels in _parts(network, patch_size)
    )
    weights = 4 * count_weights(network)
    return (weights + size * _PREDICTION_COPIES * largest) / MIB


def count_weights(network: NetworkConfig) -> int:
    """Estimate the number of weights of a network, to about ten per cent.

    Args:
        network: A configuration.

    Returns:
        The number.
    """
    widths = _level_channels(network)
    total = 0
    for above, below in itertools.pairwise(widths):
        total += 8 * above * below + 27 * 3 * above * above
    dims = network.dims
    for index, channels in enumerate(dims):
        before = dims[index - 1] if index else 0
        total += 8 * before * channels
        total += 57 * channels**2 if _has_gsc(network) else 0
        total += 54 * channels**2 * _conv_blocks(network, index)
        total += network.depths[index] * 3 * network.expand * channels**2
    if network.bottleneck != "none":
        total += 27 * network.hidden_size * (dims[-1] + network.hidden_size)
    if network.skip_block != "identity":
        total += sum(27 * w * (c + w) for c, w in zip(dims, widths[1:-1], strict=False))
    return total


def _parts(network: NetworkConfig, patch: Size3) -> list[tuple[float, int, int]]:
    """Copies, channels and voxels of each part that keeps activations."""
    widths, sizes = _level_channels(network), _level_sizes(network, patch)
    parts = [(2 * _BLOCK_COPIES, widths[0], sizes[0])]
    for width, voxels in zip(widths[1:], sizes[1:], strict=False):
        blocks = 1.0 if network.skip_block == "identity" else 2.0
        parts.append((blocks * _BLOCK_COPIES, width, voxels))
    for index, channels in enumerate(network.dims):
        copies = _BLOCK_COPIES * _conv_blocks(network, index)
        copies += _GSC_COPIES if _has_gsc(network) else 0
        copies += _MAMBA_COPIES * network.depths[index]
        parts.append((copies, channels, sizes[index + 1]))
    return parts


def _level_sizes(network: NetworkConfig, patch: Size3) -> list[int]:
    sizes, size = [math.prod(patch)], tuple(patch)
    extra = [network.strides[-1]] if network.bottleneck == "down" else []
    for stride in [*network.strides, *extra]:
        size = tuple(-(-n // step) for n, step in zip(size, stride, strict=True))
        sizes.append(math.prod(size))
    return sizes


def _level_channels(network: NetworkConfig) -> list[int]:
    """Channels of the decoder's levels, full resolution first (as in `nn`)."""
    base = network.base_channels or network.dims[0]
    if network.bottleneck == "none":
        return [base, *network.dims]
    if network.bottleneck == "down":
        return [base, *network.dims, network.hidden_size]
    return [base, *network.dims[1:], network.hidden_size]


def _has_gsc(network: NetworkConfig) -> bool:
    return (network.gsc or "add") != "none"


def _conv_blocks(network: NetworkConfig, index: int) -> int:
    return network.conv_blocks[index] if network.conv_blocks else 0
