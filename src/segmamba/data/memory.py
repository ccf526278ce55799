"""How much memory a network should take, before it is trained."""

from __future__ import annotations

import itertools
import math

import torch

from segmamba.config import AnyNetworkConfig, NetworkConfig, PeerConfig
from segmamba.nn.footprint import footprint
from segmamba.types import Size3

MIB = 2**20
DEFAULT_MEMORY_MIB = 8 * 1024.0
"""Target where the device doesn't say what it has."""
USABLE_SHARE = 0.9
"""Share of the memory that a training step may fill."""

# What a training step keeps for its backward pass, in copies of one float32 tensor of
# (channels, voxels) of that part; docs/concepts/plan.md says how it was measured.
_RESIDUAL_PROJECTED = 5
_RESIDUAL = 4
_DECODER = {"residual": 7, "conv": 4}
_STAGE_ENTRY = 2
_GSC = 10
_SKIP_MLP = 6
_LAYER_MLP = 10
_MAMBA = {"cpu": 12, "cuda": 57}  # Numba; plain PyTorch in chunks
_PREDICTION = 10  # of the largest level, alive at once without gradients

_BYTES = {"cpu": 4.0, "cuda": 2.5}  # float32; bfloat16, but norms keep float32
_STATE_BYTES = 12  # of a weight: itself, its momentum, its moving average
_RUNTIME_MIB = 150.0  # buffers of the convolution library

Part = tuple[float, int, int]
"""Copies, channels and voxels of one module."""


def device_memory_mib(device: str) -> float:
    """Give the memory of a device, as far as planning cares.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        MiB of the GPU if it is there, otherwise 8 GiB, so that plans for CPUs are the
        same everywhere.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.device(device)).total_memory / MIB
    return DEFAULT_MEMORY_MIB


def training_memory_mib(
    network: AnyNetworkConfig, patch_size: Size3, batch_size: int, device: str = "cpu"
) -> float:
    """Estimate the peak memory of a training step.

    Args:
        network: A configuration with its strides and channels.
        patch_size: Voxels along (D, H, W).
        batch_size: Patches in a batch.
        device: "cpu" (float32, Numba scans) or "cuda" (bfloat16, PyTorch scans).

    Returns:
        MiB for weights, gradients, optimiser, moving average and activations, without
        the interpreter. Within 30 % of what was measured on CPUs.
    """
    kind = _kind(device)
    if isinstance(network, PeerConfig):
        return _peer_training_mib(network, math.prod(patch_size) * batch_size, kind)
    parts = _parts(network, patch_size, kind)
    numbers = sum(copies * channels * voxels for copies, channels, voxels in parts)
    if network.checkpointing:  # inputs of all modules, and one module at a time
        largest = max(copies * channels * voxels for copies, channels, voxels in parts)
        numbers = largest + sum(channels * voxels for _, channels, voxels in parts)
    numbers += (network.in_channels + 2 * network.out_channels) * math.prod(patch_size)
    weights = count_weights(network)
    activations = max(batch_size * _BYTES[kind] * numbers, 4 * weights)
    return _RUNTIME_MIB + (_STATE_BYTES * weights + activations) / MIB


def prediction_memory_mib(
    network: AnyNetworkConfig, patch_size: Size3, device: str = "cpu"
) -> float:
    """Estimate the peak memory of one window's forward pass, without gradients.

    Args:
        network: A configuration with its strides and channels.
        patch_size: Voxels of the window along (D, H, W).
        device: "cpu" or "cuda", as for training.

    Returns:
        MiB for weights and activations.
    """
    kind = _kind(device)
    if isinstance(network, PeerConfig):
        measured = footprint(network)
        alive = measured.prediction_bytes * _BYTES[kind] / 4 * math.prod(patch_size)
        return _RUNTIME_MIB / 2 + (4 * measured.weights + alive) / MIB
    parts = _parts(network, patch_size, kind)
    largest = max(channels * voxels for _, channels, voxels in parts)
    weights = 4 * count_weights(network)
    return (weights + _BYTES[kind] * _PREDICTION * largest) / MIB


def count_weights(network: AnyNetworkConfig) -> int:
    """Estimate the number of weights of a network, to about ten per cent.

    Args:
        network: A configuration.

    Returns:
        The number; exact for the networks of other papers.
    """
    if isinstance(network, PeerConfig):
        return footprint(network).weights
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


def _peer_training_mib(network: PeerConfig, voxels: int, kind: str) -> float:
    """Scale what one image of another paper's network keeps, as counted in `nn`."""
    measured = footprint(network)
    activations = measured.training_bytes * _BYTES[kind] / 4 * voxels
    return _RUNTIME_MIB + (_STATE_BYTES * measured.weights + activations) / MIB


def _parts(network: NetworkConfig, patch: Size3, kind: str) -> list[Part]:
    """What each module keeps for the backward pass."""
    widths, sizes = _level_channels(network), _level_sizes(network, patch)
    levels = list(zip(widths, sizes, strict=True))
    decoder = _DECODER[network.decoder_block or "residual"]
    parts: list[Part] = [(_RESIDUAL_PROJECTED, *levels[0])]
    parts += [(decoder, *level) for level in levels[:-1]]
    if network.final_block is not False:
        parts.append((_RESIDUAL, *levels[0]))
    if network.stem == "serial":
        parts.append((1, *levels[0]))
    if network.skip_block != "identity":
        parts += [(_RESIDUAL_PROJECTED, *level) for level in levels[1:-1]]
    if network.bottleneck != "none":
        parts.append((_RESIDUAL_PROJECTED, *levels[-1]))
    for index, channels in enumerate(network.dims):
        copies = _stage_copies(network, index, kind)
        parts.append((copies, channels, sizes[index + 1]))
    return parts


def _stage_copies(network: NetworkConfig, index: int, kind: str) -> float:
    depth = network.depths[index]
    layer = _MAMBA[kind] + (_LAYER_MLP if network.mlp == "layer" else 0)
    copies = _STAGE_ENTRY + _RESIDUAL * _conv_blocks(network, index) + depth * layer
    if _has_gsc(network):
        copies += _GSC * (depth if network.gsc_per_layer else 1)
    return copies + (_SKIP_MLP if (network.mlp or "skip") == "skip" else 0)


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


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"
