"""How scans are cut into blocks, and the launches of their kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel

LOG2E = math.log2(math.e)

STATES = 16
"""States N of the kernels."""

_LANES = 32
"""Channels of a warp."""

_WARPS = (3, 4, 2)
"""Warps that share B and C, if they divide those that the channels need."""

_SQUARE, _HELD = 16, 12
"""Channels of a warp of the gradients' kernel, and warps that a multiprocessor holds,
for the sake of 168 registers a thread."""

_PART = 32
"""Steps of a chunk that the gradients' kernel does at a time, if it has more."""

_SEGMENTS, _CARRIED = 32, 16
"""Parts of a sequence that are carried at once, and channels of a block that does."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers by which the kernels' sources know types."""


def ceil_divide(count: int, size: int) -> int:
    """How many parts of a size cover a count."""
    return -(-count // size)


def kind_of(tensor: Tensor) -> int:
    """The number by which the kernels' sources know a tensor's type."""
    return KINDS[tensor.dtype]


def chunk_steps(length: int) -> int:
    """Steps of a chunk: long sequences have long ones, short ones enough of them.

    Args:
        length: Steps of the sequence.

    Returns:
        16, 32 or 128.
    """
    return 128 if length >= 16384 else 32 if length >= 2048 else 16


def kept_shape(rows: int, length: int, channels: int) -> tuple[int, ...]:
    """Shape of what `run_forward` keeps for `run_backward`.

    Args:
        rows: Sequences.
        length: Steps of each.
        channels: Channels E.

    Returns:
        (rows, parts + 1, N + 1, E): the state at each part's start, a multiple of
        `_PART` steps or a chunk, the last one behind them; in the row behind the states
        of a chunk's last slot, its sum of step sizes.
    """
    steps = chunk_steps(length)
    slots = ceil_divide(length, steps) * (steps // part_steps(steps))
    return rows, slots + 1, STATES + 1, channels


def part_steps(steps: int) -> int:
    """Steps of a chunk that the gradients' kernel does at a time."""
    return min(_PART, steps)


@functools.cache  # for good: recorded graphs hold addresses
def order_table(orders: tuple[tuple[int, bool], ...], device: torch.device) -> Tensor:
    """Strides and directions as kernels read them: (K, 2) int32 on the device."""
    rows = [[stride, int(reverse)] for stride, reverse in orders]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.cache
def block_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have: 64 KiB where nobody says.

    Args:
        device: A GPU; on a CPU, an emulated large one.
    """
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; one where the tests' emulator plays it."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Scan:
    """Inputs of a scan of rows of sequences, in the kernels' form.

    Attributes:
        u: (K * batch, L, E), by position.
        code: Code of the step sizes, last axis of rows.
        B: (.., L, N), last axis contiguous.
        C: (.., L, N), last axis contiguous.
        rates: A / ln 2, (K, N, E), float32.
        weight: (K, rank, E), float32.
        bias: (K, E), float32.
        skip: D, (K, E), float32.
        orders: Stride and direction of each of K directions.
    """

    u: Tensor
    code: Tensor
    B: Tensor
    C: Tensor
    rates: Tensor
    weight: Tensor
    bias: Tensor
    skip: Tensor
    orders: tuple[tuple[int, bool], ...]

    @property
    def rows(self) -> int:
        return self.u.shape[0]

    @property
    def length(self) -> int:
        return self.u.shape[1]

    @property
    def channels(self) -> int:
        return self.u.shape[2]

    @property
    def batch(self) -> int:
        return self.rows // len(self.orders)

    @property
    def rank(self) -> int:
        return self.weight.shape[1]

    @property
    def steps(self) -> int:
        return chunk_steps(self.length)

    @property
    def chunks(self) -> int:
        return ceil_divide(self.length, self.steps)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        needed = ceil_divide(self.channels, _LANES)
        return next((n for n in _WARPS if needed % n == 0), 1)

    @property
    def parts(self) -> int:
        """Blocks that share B and C."""
        return ceil_divide(self.channels, _LANES * self.warps)

    @property
    def table(self) -> Tensor:
        return order_table(self.orders, self.u.device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that every kernel takes: L, E, batch, chunks."""
        return self.length, self.channels, self.batch, self.chunks

    def kernel(self, name: str) -> Kernel:
        """Give a kernel of scan.cu for the scan's types and sizes."""
        cut = {"WARPS": self.warps, "SEGMENTS": _SEGMENTS, "CARRIED": _CARRIED}
        return self.compiled("scan.cu", name, **cut)

    def compiled(self, file: str, name: str, **constants: int) -> Kernel:
        """Give a kernel for the scan's types and chunks."""
        device, kind = self.u.device, kind_of(self.u)
        return kernel(file, name, device, KIND=kind, CHUNK=self.steps, **constants)

    def code_bytes(self, rows: int) -> int:
        """Shared memory for the code of some rows."""
        return 4 * self.rank * rows

    def every(self, slots: Tensor) -> int:
        """Slots for a chunk: parts of it, where states between them are kept."""
        return (slots.shape[1] - 1) // self.chunks


def run_forward(scan: Scan, y: Tensor, kept: Tensor, *, add: bool = False) -> None:
    """Scan all rows.

    Args:
        scan: The inputs.
        y: Written: (rows, L, E) by token.
        kept: Written: states and sums of step sizes; see `kept_shape`.
        add: Add to y instead.
    """
    grid = (scan.chunks, scan.parts, scan.rows)
    threads, shared = _LANES * scan.warps, scan.code_bytes(scan.steps)
    parameters = (scan.rates, scan.weight, scan.bias)
    strides = (scan.code.stride(-2), scan.B.stride(-2))
    every = scan.every(kept)
    scan.kernel("scan_chunks")(
        grid,
        threads,
        scan.u,
        scan.code,
        scan.B,
        *parameters,
        kept,
        *scan.sizes,
        scan.rank,
        *strides,
        every,
        shared=shared,
    )
    _carry(scan, kept, kept, back=False)
    scan.kernel("scan_outputs")(
        grid,
        threads,
        scan.u,
        scan.code,
        scan.B,
        scan.C,
        *parameters,
        scan.skip,
        scan.table,
        kept,
        y,
        *scan.sizes,
        scan.rank,
        *strides,
        scan.C.stride(-2),
        int(add),
        every,
        shared=shared,
    )


def _carry(scan: Scan, states: Tensor, kept: Tensor, *, back: bool) -> None:
    scan.kernel("carry_states")(
        (ceil_divide(scan.channels, _CARRIED), STATES, scan.rows),
        _CARRIED * _SEGMENTS,
        states,
        kept,
        scan.rates,
        scan.channels,
        scan.batch,
        scan.chunks,
        int(back),
        scan.every(states),
        scan.every(kept),
    )


@dataclass(frozen=True)
class ScanGradients:
    """What `run_backward` gives besides gradients of u.

    Attributes:
        rows: (rows, L, E + 2 N): of step sizes before softplus; of B, of C,
            summed over channels.
        A: (K, N, E), float32: of A itself.
        D: (K, E), float32.
        bias: (K, E), float32: of the step sizes' bias.
    """

    rows: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor


def run_backward(
    scan: Scan, kept: Tensor, grad_y: Tensor, grad_u: Tensor
) -> ScanGradients:
    """Differentiate `run_forward`.

    Args:
        scan: The inputs.
        kept: As `run_forward` wrote it.
        grad_y: (rows or batch, L, E) by token; with batch rows, all directions' sum
            has this gradient.
        grad_u: Written: (rows, L, E), by position.

    Returns:
        The other gradients.
    """
    shape = (scan.rows, scan.chunks + 1, STATES + 1, scan.channels)
    adjoints = scan.rates.new_empty(shape)
    scan.kernel("adjoint_chunks")(
        (scan.chunks - 1, scan.parts, scan.rows),
        _LANES * scan.warps,
        grad_y,
        scan.code,
        scan.C,
        scan.rates,
        scan.weight,
        scan.bias,
        scan.table,
        adjoints,
        *scan.sizes,
        grad_y.shape[0],
        scan.rank,
        scan.code.stride(-2),
        scan.C.stride(-2),
        shared=scan.code_bytes(scan.steps),
    )
    _carry(scan, adjoints, kept, back=True)
    return _gradients(scan, kept, adjoints, grad_y, grad_u)


@dataclass(frozen=True)
class _Cut:
    """How the gradients' kernel is cut.

    Attributes:
        warps: Of a block.
        parts: Blocks that share B and C.
    """

    warps: int
    parts: int

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds."""
        return _HELD // self.warps


def _cut(scan: Scan) -> _Cut:
    """Choose the largest blocks that leave no warp idle and fit the shared memory."""
    needed, room = ceil_divide(scan.channels, _SQUARE), block_memory(scan.u.device)
    cuts = (
        _Cut(warps, needed // warps)
        for warps in range(_HELD // 2, 0, -1)
        if needed % warps == 0
    )
    return next(
        cut for cut in cuts if cut.warps == 1 or _shared_bytes(scan, cut) <= room
    )


def _gradients(
    scan: Scan, kept: Tensor, adjoints: Tensor, grad_y: Tensor, grad_u: Tensor
) -> ScanGradients:
    cut = _cut(scan)
    blocks = _blocks(scan, cut)
    width = scan.channels + 2 * STATES
    rows = grad_u.new_empty(scan.rows, scan.length, width)
    of_states = rows[..., scan.channels :]
    constants = {"WARPS": cut.warps, "RESIDENT": cut.resident}
    if cut.parts > 1:
        shape = (cut.parts, scan.rows, scan.length, 2 * STATES)
        of_states = scan.rates.new_empty(shape)
        constants["SPLIT"] = 1
    sums = scan.rates.new_empty(blocks, scan.rows, STATES + 2, scan.channels)
    scan.compiled("scan_backward.cu", "scan_gradients", **constants)(
        (blocks, cut.parts, scan.rows),
        _LANES * cut.warps,
        grad_y,
        scan.u,
        scan.code,
        scan.B,
        scan.C,
        scan.rates,
        scan.weight,
        scan.bias,
        scan.skip,
        scan.table,
        kept,
        adjoints,
        grad_u,
        rows,
        of_states,
        sums,
        *scan.sizes,
        grad_y.shape[0],
        scan.rank,
        scan.code.stride(-2),
        scan.B.stride(-2),
        scan.C.stride(-2),
        width,
        of_states.stride(-2),
        shared=_shared_bytes(scan, cut),
    )
    if cut.parts > 1:
        rows[..., scan.channels :] = of_states.sum(0)
    total = sums.view(blocks, len(scan.orders), scan.batch, STATES + 2, -1).sum((0, 2))
    return ScanGradients(rows, total[:, :-2], total[:, -2], total[:, -1])


def _blocks(scan: Scan, cut: _Cut) -> int:
    """Blocks along the chunks: as many as are at work at once, each with the like."""
    others = cut.parts * scan.rows
    room = max(1, cut.resident * multiprocessors(scan.u.device) // others)
    return ceil_divide(scan.chunks, ceil_divide(scan.chunks, room))


def _shared_bytes(scan: Scan, cut: _Cut) -> int:
    """Size of the gradients' kernel's shared memory: struct Shared, and the code."""
    part = part_steps(scan.steps)
    pitch = part + 4
    own = 3 * (16 * pitch + 40) + part // 4 * 8 * _LANES
    return 4 * (2 * STATES * pitch + cut.warps * own) + scan.code_bytes(part)
