"""Batches ahead of time, on a GPU on streams beside the training's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from segmamba.data.augment import Batch
from segmamba.training.batches import BatchMaker, to_device
from segmamba.training.prefetch import Prefetcher

GPU_WORKERS = 4
"""Threads beside a GPU: one in need of a rotation takes several steps' time."""

Made = tuple[list[Batch], "torch.cuda.Event | None"]
"""Batches of steps one after the other, and on a GPU what tells when they are there."""


class Feed:
    """Hand a training its batches in order, prepared ahead by threads.

    On a GPU each thread copies and augments on a stream of its own: it never waits for
    the training's launches, nor the training for its own. Use it as a context manager.

    Args:
        make_batch: Gives the batch of a step, a `BatchMaker` also those of several;
            called from several threads at once.
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
        self._first_step, self._stop_step = first_step, stop_step
        self._ready: deque[Batch] = deque()
        self._own = threading.local()
        if workers is None:
            workers = default_workers(device)
        is_maker = isinstance(make_batch, BatchMaker)
        self._size = size = make_batch.steps_at_once if is_maker else 1
        stop = None if stop_step is None else -(-stop_step // size)
        self._ahead = Prefetcher(self._make, first_step // size, stop, workers)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ahead.close()

    def next(self) -> Batch:
        """Give the next batch, on the device, or raise what making it raised."""
        if not self._ready:
            batches, event = next(self._ahead)
            if event is not None:
                self._receive(batches, event)
            self._ready.extend(batches)
        return self._ready.popleft()

    def waited_s(self) -> float:
        """Give the seconds that `next` has waited for threads since the last call."""
        return self._ahead.waited_s()

    def _receive(self, batches: list[Batch], event: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for batch in batches:
            for tensor in (batch.image, batch.label):
                tensor.record_stream(stream)  # its memory is another stream's

    def _make(self, block: int) -> Made:
        if self._device.type != "cuda":
            return self._batches(block), None
        stream = self._stream()
        with torch.cuda.stream(stream):
            batches = self._batches(block)
            event = torch.cuda.Event()
            event.record(stream)
        return batches, event

    def _batches(self, block: int) -> list[Batch]:
        """Give a block's batches, less those of steps that nobody wants."""
        if not isinstance(self._make_batch, BatchMaker):
            return [to_device(self._make_batch(block), self._device)]
        begin = block * self._size
        stop = None if self._stop_step is None else self._stop_step - begin
        wanted = slice(max(self._first_step - begin, 0), stop)
        batches = self._make_batch.block(block)[wanted]
        return [to_device(batch, self._device) for batch in batches]

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
