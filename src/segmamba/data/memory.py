"""How much memory a network should take, before it is trained."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from segmamba.config import AnyNetworkConfig, NetworkConfig, PeerConfig
from segmamba.data.augment import AT_ONCE
from segmamba.data.planning import total_strides
from segmamba.nn.footprint import footprint
from segmamba.types import Size3

MIB = 2**20
DEFAULT_MEMORY_MIB = 8 * 1024.0
"""Target where the device doesn't say what it has."""
USABLE_SHARE = 0.9
"""Share of the memory that a training step may fill."""


@dataclass(frozen=True)
class _Device:
    """What a step keeps, in copies of one tensor of (channels, voxels) of each part.

    docs/concepts/plan.md says how these were counted.
    """

    number_bytes: int
    """Of an activation."""
    weight_bytes: int
    """Of a weight: itself, its momentum, its moving average; its bfloat16 copy."""
    residual_projected: float
    residual: float
    decoder: dict[str, float]
    gsc: dict[str, float]
    skip_mlp: float
    layer_mlp: float
    mamba: float
    """Of a Mamba layer, but for what its inner channels take."""
    mamba_inner: float
    """For each of the inner channels that stand for one outer channel."""
    mamba_direction: float
    """The same for each direction."""
    image: float
    """For each channel of the image."""
    logits: float
    """For each output, while the loss is computed."""
    backward: float
    """Gradients in flight, in copies of the features at full resolution."""
    prediction_weight_bytes: int
    """Of a weight without gradients: itself; its bfloat16 copy."""
    prediction: dict[str, float]
    """Alive at once without gradients, in copies of the largest level, by decoder."""
    runtime_mib: float
    """Buffers of the convolution library."""


_DEVICES = {
    # float32, Numba
    "cpu": _Device(
        number_bytes=4,
        weight_bytes=12,
        residual_projected=5,
        residual=4,
        decoder={"residual": 7, "conv": 4},
        gsc={"add": 10, "mul": 10, "paper": 10},
        skip_mlp=6,
        layer_mlp=10,
        mamba=12,
        mamba_inner=0,
        mamba_direction=0,
        image=1,
        logits=2,
        backward=0,
        prediction_weight_bytes=4,
        prediction={"residual": 10, "conv": 10},
        runtime_mib=150,
    ),
    # bfloat16; kernels of ours that make normed maps and shortcuts again
    "cuda": _Device(
        number_bytes=2,
        weight_bytes=14,
        residual_projected=3,
        residual=3,
        decoder={"residual": 4, "conv": 3},
        gsc={"add": 6.5, "mul": 8.5, "paper": 8},
        skip_mlp=6,
        layer_mlp=10,
        mamba=2,
        mamba_inner=1,
        mamba_direction=1.07,
        image=5,
        logits=8,
        backward=2.5,
        prediction_weight_bytes=6,
        prediction={"residual": 5.8, "conv": 5.1},
        runtime_mib=55,
    ),
}
_PEER_BYTES = {
    "unet": (2.1, 2.6),
    "resenc": (1.85, 2.9),
    "uxnet": (2.1, 2.6),
    "segresnet": (4.6, 4.6),
    "unetr": (2.3, 3.1),
    "swinunetr": (3.2, 4.0),
    "swinunetr-v2": (3.2, 4.0),
    "mednext": (2.4, 2.6),
}
"""Bytes on a GPU of a number that `footprint` counts, in training and prediction:
under autocast norms and softmax take float32, and some keep a bfloat16 copy too."""

_STAGE_ENTRY = 2
_BATCHES = 7
"""On a GPU: in use, waiting (`segmamba.training.feed`), and in the making."""

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
        device: "cpu" (float32, Numba scans) or "cuda" (bfloat16, kernels of ours).

    Returns:
        MiB for weights, gradients, optimiser, moving average, activations and batches
        that wait. On a CPU, without the interpreter, within 30 % of what was measured;
        on a GPU, of what PyTorch has allocated, 0 to 15 % above it.
    """
    kind = _kind(device)
    traits, voxels = _DEVICES[kind], math.prod(patch_size)
    if isinstance(network, PeerConfig):
        measured = footprint(network)
        share = _peer_bytes(network, kind)[0] / 4
        weights = measured.weights
        activations = batch_size * voxels * share * measured.training_bytes
    else:
        weights = count_weights(network)
        numbers = _kept_numbers(network, patch_size, kind)
        activations = batch_size * traits.number_bytes * numbers
        activations = max(activations, 4 * weights)  # then there are gradients only
    waiting = _waiting_bytes(network.in_channels, batch_size * voxels, kind)
    held = traits.weight_bytes * weights + activations + waiting
    return traits.runtime_mib + held / MIB


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
    traits, voxels = _DEVICES[kind], math.prod(patch_size)
    if isinstance(network, PeerConfig):
        measured = footprint(network)
        share = _peer_bytes(network, kind)[1] / 4
        alive = share * measured.prediction_bytes * voxels
        return traits.runtime_mib / 2 + (4 * measured.weights + alive) / MIB
    parts = [*_encoder_parts(network, patch_size, kind)]
    parts += _decoder_parts(network, patch_size, kind)
    copies = traits.prediction[network.decoder_block or "residual"]
    inside = copies * max(channels * size for _, channels, size in parts)
    at_end = (2 * _level_channels(network)[0] + 3 * network.out_channels) * voxels
    weights = traits.prediction_weight_bytes * count_weights(network)
    return (weights + traits.number_bytes * max(inside, at_end)) / MIB


def count_weights(network: AnyNetworkConfig) -> int:
    """Estimate the number of weights of a network, to about three per cent.

    Args:
        network: A configuration.

    Returns:
        The number; exact for the networks of other papers.
    """
    if isinstance(network, PeerConfig):
        return footprint(network).weights
    widths, dims = _level_channels(network), network.dims
    total = 27 * network.in_channels * widths[0]
    decoder = 83 if network.decoder_block != "conv" else 54
    for above, below in itertools.pairwise(widths):
        total += 8 * above * below + decoder * above**2
    if network.final_block is not False:
        total += 54 * widths[0] ** 2
    for index, channels in enumerate(dims):
        before = dims[index - 1] if index else 0
        before = widths[0] if network.stem == "serial" and not index else before
        total += 8 * before * channels + channels**2 * _stage_weights(network, index)
    if network.bottleneck != "none":
        before = dims[-1]
        if network.bottleneck == "down":
            total, before = total + 8 * before * widths[-1], widths[-1]
        total += 28 * before * widths[-1] + 27 * widths[-1] ** 2
    if network.skip_block != "identity":
        total += sum(
            28 * c * w + 27 * w**2 for c, w in zip(dims, widths[1:-1], strict=False)
        )
    return total


def _stage_weights(network: NetworkConfig, index: int) -> int:
    """Weights of a stage behind its entry, for each pair of its channels."""
    depth = network.depths[index]
    count = 54 * _conv_blocks(network, index) + depth * 3 * network.expand
    if _has_gsc(network):
        count += 56 * (depth if network.gsc_per_layer else 1)
    mlp = network.mlp or "skip"
    return count + {"skip": 4, "layer": 8 * depth, "none": 0}[mlp]


def _peer_bytes(network: PeerConfig, kind: str) -> tuple[float, float]:
    """Bytes of a number in training and in prediction."""
    return _PEER_BYTES[network.name] if kind == "cuda" else (4, 4)


def _waiting_bytes(channels: int, voxels: int, kind: str) -> int:
    """What batches take on a GPU that are made ahead, small ones many at once."""
    if kind == "cpu":
        return 0
    return _BATCHES * (4 * max(channels * voxels, AT_ONCE) + 2 * voxels)


def _kept_numbers(network: NetworkConfig, patch: Size3, kind: str) -> float:
    """Numbers that one patch has in memory where the backward pass needs most."""
    traits, voxels = _DEVICES[kind], math.prod(patch)
    encoder = _encoder_parts(network, patch, kind)
    decoder = _decoder_parts(network, patch, kind)
    moving = traits.backward * _level_channels(network)[0]
    ends = max(traits.logits * network.out_channels, moving) * voxels
    image = traits.image * network.in_channels * voxels
    if not network.checkpointing:
        return _sum(encoder) + _sum(decoder) + image + ends
    # Inputs of all modules, and one module at a time; the decoder's go first.
    of_decoder = _inputs(encoder) + _inputs(decoder) + _largest(decoder) + ends
    return image + max(of_decoder, _inputs(encoder) + _largest(encoder))


def _sum(parts: list[Part]) -> float:
    return sum(copies * channels * voxels for copies, channels, voxels in parts)


def _largest(parts: list[Part]) -> float:
    return max(copies * channels * voxels for copies, channels, voxels in parts)


def _inputs(parts: list[Part]) -> float:
    return sum(channels * voxels for _, channels, voxels in parts)


def _encoder_parts(network: NetworkConfig, patch: Size3, kind: str) -> list[Part]:
    """What each module keeps for the backward pass, as far as the skips."""
    traits = _DEVICES[kind]
    widths, sizes = _level_channels(network), _level_sizes(network, patch)
    levels = list(zip(widths, sizes, strict=True))
    parts: list[Part] = [(traits.residual_projected, *levels[0])]
    if network.stem == "serial":
        parts.append((1, *levels[0]))
    for index, channels in enumerate(network.dims):
        copies = _stage_copies(network, index, traits)
        parts.append((copies, channels, sizes[index + 1]))
    if network.skip_block != "identity":
        parts += [(traits.residual_projected, *level) for level in levels[1:-1]]
    if network.bottleneck != "none":
        parts.append((traits.residual_projected, *levels[-1]))
    return parts


def _decoder_parts(network: NetworkConfig, patch: Size3, kind: str) -> list[Part]:
    traits = _DEVICES[kind]
    widths, sizes = _level_channels(network), _level_sizes(network, patch)
    copies = traits.decoder[network.decoder_block or "residual"]
    levels = list(zip(widths, sizes, strict=True))
    parts: list[Part] = [(copies, *level) for level in levels[:-1]]
    if network.final_block is not False:
        parts.append((traits.residual, *levels[0]))
    return parts


def _stage_copies(network: NetworkConfig, index: int, traits: _Device) -> float:
    depth = network.depths[index]
    directions = len(network.orientations or (1, 2, 3))
    inner = traits.mamba_inner + traits.mamba_direction * directions
    layer = traits.mamba + network.expand * inner
    layer += traits.layer_mlp if network.mlp == "layer" else 0
    copies = _STAGE_ENTRY + traits.residual * _conv_blocks(network, index)
    copies += depth * layer
    if _has_gsc(network):
        gsc = traits.gsc[network.gsc or "add"]
        copies += gsc * (depth if network.gsc_per_layer else 1)
    return copies + (traits.skip_mlp if (network.mlp or "skip") == "skip" else 0)


def _level_sizes(network: NetworkConfig, patch: Size3) -> list[int]:
    """Voxels of each level, full resolution first; the network pads the image."""
    strides = list(network.strides)
    strides += [strides[-1]] if network.bottleneck == "down" else []
    totals = total_strides(strides)
    sizes = [math.prod(-(-n // t) * t for n, t in zip(patch, totals, strict=True))]
    for stride in strides:
        sizes.append(sizes[-1] // math.prod(stride))
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
