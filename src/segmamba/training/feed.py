"""Batches ahead of time, on a GPU on streams beside the training's."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from segmamba.data.augment import Batch
from segmamba.training.batches import to_device
from segmamba.training.prefetch import Prefetcher

GPU_WORKERS = 4
"""Threads beside a GPU: one in need of a rotation takes several steps' time."""

Made = tuple[Batch, "torch.cuda.Event | None"]
"""A batch, and on a GPU what tells when it is there."""


class Feed:
    """Hand a training its batches in order, prepared ahead by threads.

    On a GPU each thread copies and augments on a stream of its own: it never waits for
    the training's launches, nor the training for its own. Use it as a context manager.

    Args:
        make_batch: Gives the batch of a step; called from several threads at once.
        device: Where the network trains.
        first_step: The step to start with.
        stop_step: The step before which to stop; None never stops.
        workers: Threads; 0 makes each batch when it is asked for, None takes 4 beside
            a GPU and 1 otherwise.
    """

    def __init__(
        self,
        make_batch: Callable[[int], Batch],
        device: torch.device,
        first_step: int = 0,
        stop_step: int | None = None,
        workers: int | None = None,
    ) -> None:
        if device.type == "cuda" and device.index is None:  # threads have their own
            device = torch.device("cuda", torch.cuda.current_device())
        self._make_batch, self._device = make_batch, device
        self._own = threading.local()
        if workers is None:
            workers = default_workers(device)
        self._ahead = Prefetcher(self._make, first_step, stop_step, workers)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ahead.close()

    def next(self) -> Batch:
        """Give the next batch, on the device, or raise what making it raised."""
        batch, event = next(self._ahead)
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in (batch.image, batch.label):
                tensor.record_stream(stream)  # its memory is another stream's
        return batch

    def waited_s(self) -> float:
        """Give the seconds that `next` has waited for threads since the last call."""
        return self._ahead.waited_s()

    def _make(self, step: int) -> Made:
        if self._device.type != "cuda":
            return to_device(self._make_batch(step), self._device), None
        stream = self._stream()
        with torch.cuda.stream(stream):
            batch = to_device(self._make_batch(step), self._device)
            event = torch.cuda.Event()
            event.record(stream)
        return batch, event

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            # Its few small kernels go first: training waits for none of them long.
            self._own.stream = torch.cuda.Stream(self._device, priority=-1)
            # What a batch is made from may have been put on the GPU just before.
            self._own.stream.wait_stream(torch.cuda.default_stream(self._device))
        return self._own.stream


def default_workers(device: torch.device) -> int:
    """Give the number of threads that prepare batches for a device."""
    return GPU_WORKERS if device.type == "cuda" else 1
