"""A network whose launches a GPU replays at once, as a CUDA graph.

A forward pass is over a thousand launches, and Python may need longer for them
than the GPU needs for a small window. A graph holds the launches with their addresses,
so it serves one shape and one set of weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segmamba.devices import is_out_of_memory, recording
from segmamba.nn.segmamba import SegMamba

_log = logging.getLogger(__name__)


class Replays:
    """What launches networks fastest, kept from scan to scan."""

    def __init__(self) -> None:
        self._known: dict[nn.Module, Replayed] = {}

    def launcher(
        self, network: Callable[..., Any], device: torch.device
    ) -> Callable[..., Any]:
        """Give what to call in a network's place.

        Args:
            network: A module or function.
            device: Where it is.

        Returns:
            Replayed launches for SegMamba on a GPU; the network itself elsewhere, and
            for networks of others, which may look at numbers on the way.
        """
        if device.type != "cuda" or not isinstance(network, SegMamba):
            return network
        return self._known.setdefault(network, Replayed(network))

    def forget(self) -> None:
        """Give the memory of all records back."""
        for replayed in self._known.values():
            replayed.forget()


class Replayed:
    """A network that answers as it does by itself, only sooner.

    The first pass of a shape is a plain one, which compiles kernels; the second is
    recorded; from then on the record is replayed. It is made anew when the shape, the
    precision or a weight changes. What can't be recorded, or doesn't fit
    the memory twice, runs plainly. Safe to call from several threads.

    Args:
        network: On a GPU; its launches must depend on the input's shape only.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._lock = threading.Lock()
        self._last: object = None
        self._recording: _Recording | None = None
        self._refused = False

    def __call__(self, batch: Tensor) -> Any:
        """Give the network's answer to a batch (B, C, D, H, W)."""
        if self._refused or torch.is_grad_enabled() or self.network.training:
            return self.network(batch)
        with self._lock:
            key = self._key(batch)
            if self._recording is None or self._recording.key != key:
                if self._last != key:
                    self._last, self._recording = key, None
                    return self.network(batch)
                self._record(batch, key)
            if self._recording is None:
                return self.network(batch)
            return self._recording.replay(batch)

    @property
    def has_record(self) -> bool:
        """Whether passes are replayed by now."""
        return self._recording is not None

    def forget(self) -> None:
        """Give the memory of the record back."""
        with self._lock:
            self._last = self._recording = None

    def _key(self, batch: Tensor) -> object:
        kind = batch.device.type
        weights = [*self.network.parameters(), *self.network.buffers()]
        return (
            tuple(batch.shape),
            batch.dtype,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            # Each weight's version too: an operator may keep what it made of a weight.
            tuple((weight.data_ptr(), _version(weight)) for weight in weights),
        )

    def _record(self, batch: Tensor, key: object) -> None:
        try:
            self._recording = record(self.network, batch, key)
        except RuntimeError as error:
            # Too little memory is for this shape only, and another may fit.
            self._refused = not is_out_of_memory(error)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.info("%s is not replayed: %s", type(self.network).__name__, reason)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


@dataclass
class _Recording:
    """A graph with the places of its input and output."""

    key: object
    graph: Any
    batch: Tensor
    output: Any

    def replay(self, batch: Tensor) -> Tensor:
        self.batch.copy_(batch)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over the place itself


def record(network: nn.Module, batch: Tensor, key: object) -> _Recording:
    """Record the launches of one pass.

    Args:
        network: In evaluation mode, warmed up with this very shape.
        batch: Any batch of the shape.
        key: What the record holds for.

    Returns:
        The record.

    Raises:
        RuntimeError: A step can't be recorded, or memory is short.
    """
    place = batch.clone()
    # Half-precision copies that autocast keeps must neither come from outside of
    # the record nor leave it: they wouldn't follow the weights, or not be filled.
    torch.clear_autocast_cache()
    try:
        with recording(batch.device) as graph:
            answer = network(place)
    finally:
        torch.clear_autocast_cache()
    output = answer[0] if isinstance(answer, (list, tuple)) else answer
    return _Recording(key, graph, place, output)
