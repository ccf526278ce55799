"""Launches of the instance norm's kernels; see `norm.cu`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel

NORMED = 2
"""`join` of a residual that is normed too. 0 is no residual, 1 is one that is added
before the activation, 3 one that is added after it."""

SMALL = 4096
"""Voxels of a case up to which one launch does all."""
RESIDENT = 2
"""Blocks of a sum for each multiprocessor: as many as it holds at a time."""
SWEEPS = 16
"""Rows of a thread in a pass that writes, at most."""

_THREADS = 512
_MERGED, _LANES = 8, 32
_SEGMENT = 32
"""Bytes that GPUs read at least."""

_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _ceil_divide(number: int, size: int) -> int:
    return -(-number // size)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- how the work is cut up -----------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How the work on tensors of a shape is cut up.

    Attributes:
        vector: Channels of a thread.
        columns: Threads side by side over channels in a block.
        threads: Threads of a block.
        slices: Blocks side by side over channels.
        small: One launch does all.
        chunks: Blocks that share the rows of a case in a sum.
        writers: Blocks that do in a pass that writes.
        sweeps: Rows of a thread in such a pass.
    """

    vector: int
    columns: int
    threads: int
    slices: int
    small: bool
    chunks: int
    writers: int
    sweeps: int


def plan_for(
    batch: int, voxels: int, channels: int, vector: int, size: int, processors: int
) -> Plan:
    """Cut the work up.

    Args:
        batch: Cases.
        voxels: Of a case.
        channels: Of a voxel.
        vector: Channels of a thread, a divisor of `channels`.
        size: Bytes of an element of the narrowest tensor.
        processors: Multiprocessors of the GPU.
    """
    small = voxels <= SMALL
    vectors = channels // vector
    most = max(1, _SEGMENT // (vector * size)) if small else _THREADS
    slices = _ceil_divide(vectors, most)
    columns = _ceil_divide(vectors, slices)
    rows = _block_rows(columns, voxels)
    sweeps = _ceil_divide(voxels, rows)
    others = batch * slices
    chunks = max(1, min(RESIDENT * processors // others, _ceil_divide(sweeps, 4)))
    each = min(SWEEPS, max(4, sweeps * others // (4 * processors)))
    return Plan(
        vector=vector,
        columns=columns,
        threads=rows * columns,
        slices=slices,
        small=small,
        chunks=1 if small else chunks,
        writers=_ceil_divide(sweeps, each),
        sweeps=each,
    )


def _block_rows(columns: int, voxels: int) -> int:
    """Rows of a block: whole warps where that leaves few threads out."""
    rows = min(_THREADS // columns, voxels)
    for fewer in range(rows, rows * 3 // 4, -1):
        if fewer * columns % 32 == 0:
            return fewer
    return rows


def _vector(channels: int, most: int) -> int:
    """Channels that a thread may read at once."""
    return next(v for v in (8, 4, 1) if v <= most and channels % v == 0)


class Work:
    """The plan for tensors of a kind, and the kernels."""

    def __init__(
        self,
        device: torch.device,
        shape: torch.Size,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        join: int,
        backward: bool,
        most: int,
    ) -> None:
        self.device = device
        self.batch, self.channels = shape[:2]
        self.voxels = shape[2:].numel()
        size = min(kind.itemsize for kind in types)
        vector = _vector(self.channels, most if size == 2 else min(most, 4))
        sizes = self.batch, self.voxels, self.channels
        self.plan = plan_for(*sizes, vector, size, _multiprocessors(device))
        self.sizes = *sizes, self.plan.columns
        names = dict(zip("XRY", map(_NAMES.__getitem__, types), strict=True))
        self._constants = {**names, "JOIN": join, "VEC": vector}
        self._constants["BACKWARD"] = int(backward)
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = kernel(
                "norm.cu", name, self.device, **self._constants
            )
        return self._kernels[name]

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def grid(self, blocks: int, tensors: int = 1) -> tuple[int, int, int]:
        return blocks * self.batch, self.plan.slices, tensors

    def merge_grid(self, kinds: int) -> tuple[int, int, int]:
        return _ceil_divide(self.channels, _MERGED), self.batch, kinds


_work = functools.lru_cache(maxsize=1024)(Work)


def _work_on(
    x: Tensor, residual: Tensor | None, result: Tensor, join: int, backward: bool
) -> Work:
    other = x if residual is None else residual
    addresses = x.data_ptr() | other.data_ptr() | result.data_ptr()
    types = x.dtype, other.dtype, result.dtype
    # With eight channels the sums for two norms' gradients would fill the registers.
    most = 1 if addresses % 16 else 4 if backward and join == NORMED else 8
    return _work(x.device, x.shape, types, join, backward, most)


# --- the operators --------------------------------------------------------------------


def norm(
    x: Tensor, residual: Tensor | None, join: int, slope: float, eps: float, dtype
) -> tuple[Tensor, Tensor]:
    """Normalise, join a residual, and apply a leaky ReLU.

    Args:
        x: (B, C, D, H, W), channels-last, float32, bfloat16 or float16.
        residual: As x, of any of these types, or None.
        join: How the residual joins; see `NORMED`.
        slope: Negative slope of the activation; 1 for none.
        eps: Added to the variance.
        dtype: The result's type.

    Returns:
        The result, as x; and mean and 1 / deviation of x, (B, 2, C) float32, or of x
        and of the residual, (B, 4, C).
    """
    out = torch.empty_like(x, dtype=dtype)
    work = _work_on(x, residual, out, join, backward=False)
    plan = work.plan
    tensors = 2 if join == NORMED else 1
    stats = work.new(work.batch, 2 * tensors, work.channels)
    if plan.small:
        _norm_small(work, x, residual, stats, out, slope, eps)
        return out, stats
    parts = work.new(tensors, work.batch, plan.chunks, 2, work.channels)
    work.kernel("sum_statistics")(
        work.grid(plan.chunks, tensors), plan.threads, x, residual, parts, *work.sizes
    )
    rows = plan.threads // plan.columns
    shape = plan.chunks, rows, work.voxels, work.channels
    work.kernel("merge_statistics")(
        work.merge_grid(tensors), _MERGED * _LANES, parts, stats, *shape, eps
    )
    _norm_large(work, x, residual, stats, out, slope)
    return out, stats


def norm_again(x: Tensor, stats: Tensor, slope: float, eps: float) -> Tensor:
    """Give the result of `norm` without a residual again, with the same bits.

    Args:
        x: As given to `norm`; so are slope and eps.
        stats: What `norm` gave.
        slope: See x.
        eps: See x.

    Returns:
        As x.
    """
    out = torch.empty_like(x)
    work = _work_on(x, None, out, 0, backward=False)
    if work.plan.small:
        _norm_small(work, x, None, torch.empty_like(stats), out, slope, eps)
    else:
        _norm_large(work, x, None, stats, out, slope)
    return out


def _norm_small(
    work: Work,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    out: Tensor,
    slope: float,
    eps: float,
) -> None:
    """Find statistics, and write the result."""
    arguments = x, residual, stats, out, *work.sizes, slope, eps
    work.kernel("normalise_small")(work.grid(1), work.plan.threads, *arguments)


def _norm_large(
    work: Work,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    out: Tensor,
    slope: float,
) -> None:
    """Write the result, with statistics that are there."""
    plan = work.plan
    arguments = x, residual, stats, out, *work.sizes, plan.sweeps, slope
    work.kernel("normalise_large")(work.grid(plan.writers), plan.threads, *arguments)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    join: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `norm`.

    Args:
        grad: Of the result, channels-last.
        x: As given to `norm`.
        residual: As given to `norm`; None also where it joins after.
        stats: What `norm` gave.
        join: As given to `norm`.
        slope: As given to `norm`.

    Returns:
        Gradients of x and of the residual; the latter empty where there is none, or
        where it joins after and its gradient is `grad` itself.
    """
    join = 0 if residual is None else join
    grad_x = torch.empty_like(x)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    work = _work_on(x, residual, grad, join, backward=True)
    plan = work.plan
    inputs, outputs = (grad, x, residual, stats), (grad_x, grad_residual)
    if plan.small:
        work.kernel("differentiate_small")(
            work.grid(1), plan.threads, *inputs, *outputs, *work.sizes, slope
        )
        return outputs
    kinds = 3 if join == NORMED else 2
    parts = work.new(work.batch, plan.chunks, kinds, work.channels)
    means = work.new(work.batch, kinds, work.channels)
    work.kernel("sum_gradients")(
        work.grid(plan.chunks), plan.threads, *inputs, parts, *work.sizes, slope
    )
    shape = plan.chunks, work.voxels, work.channels
    work.kernel("merge_gradients")(
        work.merge_grid(kinds), _MERGED * _LANES, parts, means, *shape
    )
    work.kernel("differentiate_large")(
        work.grid(plan.writers),
        plan.threads,
        *inputs,
        means,
        *outputs,
        *work.sizes,
        plan.sweeps,
        slope,
    )
    return outputs
