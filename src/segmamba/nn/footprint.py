"""How much memory a network takes, by running it on tensors without contents."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segmamba.config import PeerConfig
from segmamba.nn.presets import build_network
from segmamba.types import Size3

REFERENCE_SIDE = 64
"""Sides of the image that is measured, in voxels, rounded up to the strides."""


@dataclass(frozen=True)
class Footprint:
    """What one image takes in float32; it grows with the number of voxels."""

    weights: int
    """Trainable numbers."""
    training_bytes: float
    """Most bytes alive in a forward and backward pass, for each voxel of the image."""
    prediction_bytes: float
    """The same for a forward pass without gradients."""


def footprint(config: PeerConfig) -> Footprint:
    """Measure a network's memory on a reference image.

    Args:
        config: A complete configuration.

    Returns:
        The footprint, weights and their gradients not counted in the bytes.

    Raises:
        BackendUnavailableError: The package that has the network isn't installed.
    """
    size = _reference_size(config)
    if config.patch_size is not None:
        config = dataclasses.replace(config, patch_size=size)
    return _measure(config, size)


@functools.lru_cache(maxsize=64)
def _measure(config: PeerConfig, size: Size3) -> Footprint:
    # MONAI's Swin reads numbers off tensors while it is built, so not without contents.
    device = "cpu" if config.name.startswith("swin") else "meta"
    with torch.device(device):
        network = build_network(config).to("meta")
    voxels = math.prod(size)
    return Footprint(
        weights=sum(item.numel() for item in network.parameters()),
        training_bytes=peak_bytes(network, size, training=True) / voxels,
        prediction_bytes=peak_bytes(network, size, training=False) / voxels,
    )


def peak_bytes(network: nn.Module, size: Size3, *, training: bool) -> int:
    """Count the most bytes that are alive at once, without doing the work.

    Args:
        network: On the meta device, with a `config`.
        size: (D, H, W) of one image.
        training: With a backward pass, or without gradients.

    Returns:
        Bytes of activations in float32, with a backward pass also of the weights'
        gradients, which come as activations go; without the weights, and what a kernel
        needs inside.
    """
    config: Any = network.config
    image = torch.empty(1, config.in_channels, *size, device="meta")
    network.train(training)
    network.zero_grad(set_to_none=True)
    with LiveBytes(network.parameters()) as live, torch.set_grad_enabled(training):
        outputs = network(image)
        if training:
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            torch.stack([item.sum() for item in outputs]).sum().backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, until they are freed.

    Args:
        known: Tensors that are there before; neither they nor their views count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {item.untyped_storage()._cdata for item in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and note the storages of what it gives."""
        outputs = func(*args, **(kwargs or {}))
        for item in tree_leaves(outputs):
            if isinstance(item, Tensor):
                self._note(item.untyped_storage())
        return outputs

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _reference_size(config: PeerConfig) -> Size3:
    totals = [1, 1, 1]
    for stride in config.strides or ():
        totals = [total * step for total, step in zip(totals, stride, strict=True)]
    sides = [max(2, -(-REFERENCE_SIDE // total)) * total for total in totals]
    return (sides[0], sides[1], sides[2])
