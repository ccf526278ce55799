"""Batches prepared ahead by threads, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

SPARE = 1
"""Batches that may wait beside one for each thread: they take a GPU's memory."""


class Prefetcher(Generic[T]):
    """Call a function of the step ahead of time and hand out its results in order.

    What it gives does not depend on the number of threads. Use it as a context
    manager: at the end, also after an error, no thread is left.

    Args:
        make: Gives the batch of a step; called from several threads at once.
        first_step: The step to start with.
        stop_step: The step before which to stop; None never stops.
        workers: Threads; 0 makes each batch when it is asked for.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        first_step: int = 0,
        stop_step: int | None = None,
        workers: int = 1,
    ) -> None:
        self._make = make
        self._next_step = first_step
        self._stop_step = stop_step
        self._size = workers + SPARE if workers else 0
        self._queue: deque[Future[T]] = deque()
        self._waited_s = 0.0
        self._pool = (
            ThreadPoolExecutor(workers, thread_name_prefix="segmamba-batches")
            if workers > 0
            else None
        )

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        """Give the next batch, or raise what making it raised."""
        if self._pool is None:
            if not self._has_next():
                raise StopIteration
            self._next_step += 1
            return self._wait(lambda: self._make(self._next_step - 1))
        self._fill(self._pool)
        if not self._queue:
            raise StopIteration
        batch = self._wait(self._queue.popleft().result)
        self._fill(self._pool)
        return batch

    def waited_s(self) -> float:
        """Give the seconds that `next` has waited for batches since the last call."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def close(self) -> None:
        """Drop what is waiting and wait for the threads to end."""
        self._queue.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, get: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return get()
        finally:
            self._waited_s += time.perf_counter() - begin

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        while len(self._queue) < self._size and self._has_next():
            self._queue.append(pool.submit(self._make, self._next_step))
            self._next_step += 1

    def _has_next(self) -> bool:
        return self._stop_step is None or self._next_step < self._stop_step
