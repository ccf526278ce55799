"""A moving average of the weights: what predictions use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from segmamba.errors import CheckpointError, describe


class WeightAverage:
    """An exponential moving average of a network's parameters and buffers.

    Args:
        network: Averaged; the average starts at its present weights.
        decay: Share of the old average kept in a step, 0 to 1. Early on it is
            (1 + t) / (10 + t) at update t, so that short runs forget their start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        # Looked up once: a network of hundreds of weights takes over a millisecond.
        self._sources = network.state_dict(keep_vars=True)
        self.tensors = {
            name: tensor.detach().clone() for name, tensor in self._sources.items()
        }

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the network's present weights.

        Args:
            updates: Updates done before this one.
        """
        keep = min(self.decay, (1 + updates) / (10 + updates))
        averages, values = [], []
        for name, tensor in self._sources.items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                values.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        get_ema_multi_avg_fn(keep)(averages, values, updates)

    @contextlib.contextmanager
    def applied(self, network: nn.Module) -> Iterator[nn.Module]:
        """Lend the average to the network; its own weights come back at the end."""
        self._swap(network)
        try:
            yield network
        finally:
            self._swap(network)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back a saved average.

        Raises:
            CheckpointError: Names or shapes differ from the network's.
        """
        expected = {name: tuple(item.shape) for name, item in self.tensors.items()}
        found = {name: tuple(item.shape) for name, item in tensors.items()}
        if expected != found:
            odd = sorted(set(expected.items()) ^ set(found.items()))
            raise CheckpointError(
                describe("the averaged weights do not fit", found=odd[:4])
            )
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def _swap(self, network: nn.Module) -> None:
        seen = set()
        for name, tensor in network.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # shared weights have two names
                tensor.data, self.tensors[name] = self.tensors[name], tensor.data
            seen.add(id(tensor))


@contextlib.contextmanager
def prediction_weights(
    network: nn.Module, average: WeightAverage | None
) -> Iterator[nn.Module]:
    """Lend out a network as predictions use it: averaged weights, eval mode.

    Args:
        network: In train mode again at the end, with its own weights.
        average: None leaves the weights as they are.
    """
    network.eval()
    try:
        with average.applied(network) if average else contextlib.nullcontext():
            yield network
    finally:
        network.train()
