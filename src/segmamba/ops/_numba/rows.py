"""What all kernels share: memory, tokens, and the rows of a task."""

from __future__ import annotations

import numpy as np

from segmamba.ops._layout import LANES
from segmamba.ops._numba.tasks import kernel


@kernel
def floats(size):
    """Memory on a cache line's start, so that no vector lies across two lines."""
    raw = np.empty(size + LANES, np.float32)
    first = -(raw.ctypes.data // 4) % LANES
    return raw[first : first + size]


@kernel
def split_rows(plan, task):
    """Case, first and last tile of a task of a `ConvPlan`."""
    part = task % plan.tasks
    begin = part * plan.tiles // plan.tasks
    return task // plan.tasks, begin, (part + 1) * plan.tiles // plan.tasks


@kernel
def list_tokens(plan, start, count, tokens):
    """Write the tokens at positions start .. start + count - 1."""
    size = plan.length // plan.stride
    position = plan.length - 1 - start if plan.reverse else start
    slow, fast = position // plan.stride, position % plan.stride
    for t in range(count):
        tokens[t] = fast * size + slow
        if plan.reverse:
            fast -= 1
            if fast < 0:
                fast, slow = plan.stride - 1, slow - 1
        else:
            fast += 1
            if fast == plan.stride:
                fast, slow = 0, slow + 1
