"""A step's forward and backward, whose launches a GPU replays as a CUDA graph.

Python needs tens of milliseconds for the launches of a step, a GPU only a few for those
of a small network. A graph holds them with their addresses: it serves batches of one
shape, and its gradients are written to the same memory each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segmamba.data.augment import Batch
from segmamba.devices import recording

PLAIN_STEPS = 3
"""Steps before any is recorded: they compile kernels and settle what is kept."""

Numbers = tuple[Tensor, Tensor]
"""Loss and gradient norm, scalars."""

_log = logging.getLogger(__name__)


class GradientReplay:
    """Gives a step's gradients sooner than the function that it records.

    Args:
        network: Gets gradients; its parameters must stay where they are.
        compute: From a batch to loss and norm, with the network's gradients written
            anew. Its launches depend on the batch's shape only.
        wanted: Whether to record at all.
    """

    def __init__(
        self, network: nn.Module, compute: Callable[[Batch], Numbers], *, wanted: bool
    ) -> None:
        self._network, self._compute = network, compute
        self._left = PLAIN_STEPS if wanted else -1
        self._record: _Record | None = None

    def takes(self, batch: Batch) -> bool:
        """Whether a batch will be replayed; records one when its time has come."""
        if self._left > 0:
            self._left -= 1
        elif self._left == 0:
            self._left = -1
            self._try_to_record(batch)
        return self._record is not None and self._record.fits(batch)

    def __call__(self, batch: Batch) -> Numbers:
        """Give loss and norm of a batch that it takes, and the network's gradients."""
        assert self._record is not None
        return self._record.replay(batch)

    def _try_to_record(self, batch: Batch) -> None:
        try:
            self._record = record(self._network, self._compute, batch)
        except RuntimeError as error:  # no memory for it, or a look at numbers
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.info("steps are not replayed: %s", reason)
            self._network.zero_grad(set_to_none=True)


@dataclass
class _Record:
    """A graph with the places of its input and its results."""

    graph: Any
    batch: Batch
    numbers: Numbers
    gradients: list[tuple[nn.Parameter, Tensor]]

    def fits(self, batch: Batch) -> bool:
        """Whether a batch has the shapes and types of the recorded one."""
        pairs = ((batch.image, self.batch.image), (batch.label, self.batch.label))
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)

    def replay(self, batch: Batch) -> Numbers:
        self.batch.image.copy_(batch.image)
        self.batch.label.copy_(batch.label)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient  # a plain step in between has made another
        self.graph.replay()
        return self.numbers


def record(
    network: nn.Module, compute: Callable[[Batch], Numbers], batch: Batch
) -> _Record:
    """Record the launches of a step's forward and backward.

    Args:
        network: Warmed up with batches of this shape.
        compute: As in `GradientReplay`.
        batch: Any batch of the shape, on a GPU.

    Returns:
        The record.

    Raises:
        RuntimeError: A step can't be recorded, or memory is short.
    """
    place = Batch(batch.image.clone(), batch.label.clone())
    network.zero_grad(set_to_none=True)  # so that the graph makes its own
    torch.cuda.empty_cache()  # the graph's memory is none of what steps have kept
    with recording(batch.image.device) as graph:
        numbers = compute(place)
    gradients = [(p, p.grad) for p in network.parameters() if p.grad is not None]
    return _Record(graph, place, numbers, gradients)
