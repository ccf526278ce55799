"""Run one function over many cases in threads, with progress and named failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from segmamba.errors import SegMambaError, describe

Result = TypeVar("Result")

Progress = Callable[[int, int, str], None]
"""Called with the number done, the total, and what was just done."""


class Named(Protocol):
    """Anything with an id, such as a `Case`."""

    @property
    def id(self) -> str:
        """The case's name."""
        ...


Item = TypeVar("Item", bound=Named)


def for_each_case(
    function: Callable[[Item], Result],
    cases: Sequence[Item],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Call a function for each case in parallel.

    Threads, not processes: reading, unpacking, NumPy and torch let go of Python's
    lock, and starting a process costs more than a small case.

    Args:
        function: What to do with a case.
        cases: The cases.
        workers: Threads; None takes the number of cores, 8 at most.
        progress: Called in the caller's thread after each case.

    Returns:
        The results in the order of the cases.

    Raises:
        SegMambaError: A case failed; the text names the first one, and cases that
            hadn't started are dropped.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="segmamba-case")
    try:
        futures = {pool.submit(function, case): case for case in cases}
        _watch(futures, progress)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _watch(futures: dict[Future[Result], Item], progress: Progress | None) -> None:
    waiting, done_count = set(futures), 0
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        if any(future.exception() for future in done):
            _raise_first(futures)
        for future in done:
            done_count += 1
            if progress is not None:
                progress(done_count, len(futures), futures[future].id)


def _raise_first(futures: dict[Future[Result], Item]) -> None:
    # The first in order, whichever thread was faster: earlier ones have all started.
    started = [future for future in futures if not future.cancel()]
    wait(started)
    for future in started:
        _raise_named(future, futures[future].id)


def _raise_named(future: Future[Result], case_id: str) -> None:
    error = future.exception()
    if error is None:
        return
    if isinstance(error, SegMambaError):
        raise type(error)(f"case {case_id}: {error}") from error
    if isinstance(error, (OSError, MemoryError)):
        gone = isinstance(error, FileNotFoundError)
        first = "Put the file back" if gone else "Free disk space or memory"
        text = describe(
            f"case {case_id} failed",
            found=f"{type(error).__name__}: {error}",
            remedy=f"{first}, then run the same again.",
        )
        raise SegMambaError(text) from error
    raise error
