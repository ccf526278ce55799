"""Compiling kernels, and running their tasks on all of torch's threads.

A kernel does one task: some channels of some rows. It releases the GIL, so plain Python
threads keep the cores busy. Numba's own threading layers are not used: they bring a
second OpenMP into torch's process, or can't be called from two threads at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import torch

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call, and keep the result on disk if possible.

    Args:
        function: What Numba shall compile; it must not need the GIL.

    Returns:
        The compiled function.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder is writable, not even the user's cache
        return numba.njit(**options)(function)
    # Numba looks at the function's own file only, and kernels inline one another. The
    # attribute is private; without it, edits need an emptied cache.
    with contextlib.suppress(AttributeError):
        compiled._cache._cache_file._source_stamp = _sources_stamp()
    return compiled


@functools.cache
def _sources_stamp() -> tuple[tuple[str, float, int], ...]:
    """Changes when any of the files that make kernels does."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "_layout.py"]
    stats = [(f.name, f.stat()) for f in files if f.exists()]
    return tuple((name, stat.st_mtime, stat.st_size) for name, stat in stats)


def run_tasks(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call function(task, *arguments) for task = 0 .. count - 1 on torch's threads.

    Args:
        function: A kernel whose tasks write to separate places.
        count: Number of tasks.
        arguments: What every task gets.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        for task in range(count):
            function(task, *arguments)
        return
    numbers = itertools.count()

    def work() -> None:
        while (task := next(numbers)) < count:
            function(task, *arguments)

    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _pool(size: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked child must not wait for its parent's."""
    key = (os.getpid(), size)
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(size, "segmamba-ops")
        return _pools[key]
