"""How scans are cut into programs, and the launches of their kernels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from segmamba.ops._triton import scan_backward_kernels, scan_kernels
from segmamba.ops.backends import triton_is_interpreted

LOG2E = math.log2(math.e)

LANES = 32
"""Channels of a program: its threads."""

_RESIDENT = 8
"""Programs of the gradients' kernel that a multiprocessor holds: 255 registers each."""

_REPLAYED = 2
"""Steps that the gradients' kernel replays into registers at a time."""

_LEFT = 4
"""Steps that it loads at a time where it leaves states, a multiple of `_REPLAYED`."""


def ceil_divide(count: int, size: int) -> int:
    """How many parts of a size cover a count."""
    return -(-count // size)


def chunk_steps(length: int) -> int:
    """Steps of a chunk: long sequences have long ones, short ones enough of them.

    Args:
        length: Steps of the sequence.

    Returns:
        16, 32 or 64.
    """
    return 64 if length >= 16384 else 32 if length >= 2048 else 16


def kept_shape(rows: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of what `run_forward` keeps for `run_backward`.

    Args:
        rows: Sequences.
        length: Steps of each.
        channels: Channels E.
        states: States N.

    Returns:
        (rows, chunks + 1, N + 1, E): the state at each chunk's start, the last one
        behind them; in the row behind the states of slot i + 1, chunk i's sum of step
        sizes.
    """
    chunks = ceil_divide(length, chunk_steps(length))
    return rows, chunks + 1, states + 1, channels


@functools.lru_cache(maxsize=256)
def order_table(orders: tuple[tuple[int, bool], ...], device: torch.device) -> Tensor:
    """Strides and directions as kernels read them: (K, 2) int32 on the device."""
    rows = [[stride, int(reverse)] for stride, reverse in orders]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Scan:
    """Inputs of a scan of rows of sequences, in the kernels' form.

    Attributes:
        u: (K * batch, L, E), by position.
        code: Code of the step sizes, last axis of rows, or step sizes (.., L, E).
        B: (.., L, G * N), last axis contiguous.
        C: (.., L, G * N), last axis contiguous.
        rates: A / ln 2, (K, N, E), float32.
        weight: (K, E, rank), float32; rank 0 where `code` has step sizes.
        bias: (K, E), float32.
        skip: D, (K, E), float32.
        orders: Stride and direction of each of K directions.
        groups: Groups of channels with a B and C of their own.
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
    groups: int = 1

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
    def states(self) -> int:
        return self.rates.shape[1]

    @property
    def batch(self) -> int:
        return self.rows // len(self.orders)

    @property
    def steps(self) -> int:
        return chunk_steps(self.length)

    @property
    def chunks(self) -> int:
        return ceil_divide(self.length, self.steps)

    @property
    def per_group(self) -> int:
        return self.channels // self.groups

    @property
    def blocks(self) -> int:
        return ceil_divide(self.per_group, LANES)

    @property
    def table(self) -> Tensor:
        return order_table(self.orders, self.u.device)

    @property
    def constants(self) -> dict[str, int | bool]:
        return {
            "N": self.states,
            "RANK": self.weight.shape[2],
            "ASM": not triton_is_interpreted(),
            "num_warps": 1,
        }

    def sizes(self, *strides: Tensor) -> tuple[int, ...]:
        """Numbers that every kernel takes, with the row strides of some tensors."""
        return (
            self.length,
            self.channels,
            self.per_group,
            self.batch,
            self.chunks,
            *(tensor.stride(-2) for tensor in strides),
            self.steps,
        )

    def new_slots(self) -> Tensor:
        """Memory for states and sums of step sizes; see `kept_shape`."""
        return self.rates.new_empty(
            kept_shape(self.rows, self.length, self.channels, self.states)
        )


def run_forward(scan: Scan, y: Tensor, kept: Tensor, *, add: bool = False) -> None:
    """Scan all rows.

    Args:
        scan: The inputs.
        y: Written: (rows, L, E) by token.
        kept: Written: states and sums of step sizes; see `kept_shape`.
        add: Add to y instead.
    """
    grid = (scan.chunks, scan.groups * scan.blocks, scan.rows)
    head = (scan.u, scan.code, scan.B)
    parameters = (scan.rates, scan.weight, scan.bias)
    scan_kernels.scan_chunks[grid](
        *head,
        *parameters,
        kept,
        *scan.sizes(scan.code, scan.B),
        BE=LANES,
        **scan.constants,
    )
    _carry(scan, kept, kept, back=False, first=False)
    scan_kernels.scan_outputs[grid](
        *head,
        scan.C,
        *parameters,
        scan.skip,
        scan.table,
        kept,
        y,
        *scan.sizes(scan.code, scan.B, scan.C),
        BE=LANES,
        ADD=add,
        **scan.constants,
    )


def _carry(
    scan: Scan, states: Tensor, kept: Tensor, *, back: bool, first: bool
) -> None:
    grid = (ceil_divide(scan.channels, LANES), scan.states, scan.rows)
    scan_kernels.carry_states[grid](
        states,
        kept,
        scan.rates,
        scan.channels,
        scan.batch,
        scan.chunks,
        N=scan.states,
        CT=min(128, max(16, triton.next_power_of_2(scan.chunks + 1))),
        BE=LANES,
        BACK=int(back),
        FIRST=first,
        num_warps=4,
    )


@dataclass(frozen=True)
class ScanGradients:
    """What `run_backward` gives besides gradients of u.

    Attributes:
        steps: Of step sizes before softplus, or of given ones, (rows, L, E).
        B: (rows, L, G * N), summed over channels.
        C: (rows, L, G * N).
        A: (K, N, E), float32: of A itself.
        D: (K, E), float32.
        bias: (K, E), float32: of the step sizes' bias.
    """

    steps: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor


def run_backward(
    scan: Scan,
    kept: Tensor,
    grad_y: Tensor,
    grad_u: Tensor,
    grad_last: Tensor | None = None,
) -> ScanGradients:
    """Differentiate `run_forward`.

    Args:
        scan: The inputs.
        kept: As `run_forward` wrote it.
        grad_y: (rows or batch, L, E) by token; with batch rows, all directions' sum
            has this gradient.
        grad_u: Written: (rows, L, E), by position.
        grad_last: Of the last states, (rows, N, E); None for zero.

    Returns:
        The other gradients.
    """
    adjoints = scan.new_slots()
    if grad_last is not None:
        adjoints[:, scan.chunks - 1, :-1] = grad_last
    grid = (scan.chunks - 1, scan.groups * scan.blocks, scan.rows)
    length, channels, per_group, batch, chunks = scan.sizes()[:5]
    if scan.chunks > 1:
        scan_backward_kernels.adjoint_chunks[grid](
            grad_y,
            scan.code,
            scan.C,
            scan.rates,
            scan.weight,
            scan.bias,
            scan.table,
            adjoints,
            length,
            channels,
            per_group,
            batch,
            chunks,
            grad_y.shape[0],
            scan.code.stride(-2),
            scan.C.stride(-2),
            scan.steps,
            **scan.constants,
        )
    _carry(scan, adjoints, kept, back=True, first=grad_last is not None)
    return _gradients(scan, kept, adjoints, grad_y, grad_u)


def _gradients(
    scan: Scan, kept: Tensor, adjoints: Tensor, grad_y: Tensor, grad_u: Tensor
) -> ScanGradients:
    programs, splits = _cut(scan)
    shared = scan.groups * scan.states
    kind = torch.float32 if splits > 1 else grad_u.dtype
    grad_bc = torch.empty(
        splits, scan.rows, scan.length, 2 * shared, dtype=kind, device=grad_u.device
    )
    count = programs * scan.groups * splits * scan.rows
    per_program = scan.steps * (scan.states * LANES // _REPLAYED + LANES)
    per_program += scan.steps * 2 * scan.states
    scratch = scan.rates.new_empty(count * per_program)
    partial = scan.rates.new_empty(programs, scan.rows, scan.states + 2, scan.channels)
    grad_step = torch.empty_like(grad_u)
    length, channels, per_group, batch, chunks = scan.sizes()[:5]
    scan_backward_kernels.scan_gradients[(programs, scan.groups * splits, scan.rows)](
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
        scratch,
        grad_u,
        grad_step,
        grad_bc,
        partial,
        length,
        channels,
        per_group,
        batch,
        chunks,
        grad_y.shape[0],
        scan.code.stride(-2),
        scan.B.stride(-2),
        scan.C.stride(-2),
        2 * shared,
        scan.rows * scan.length,
        shared,
        scan.blocks,
        splits,
        scan.steps,
        S=_REPLAYED,
        U=_LEFT,
        **scan.constants,
    )
    if splits > 1:
        grad_bc = grad_bc.sum(0, keepdim=True).to(grad_u.dtype)
    total = partial.sum(0)
    total = total.view(len(scan.orders), scan.batch, *total.shape[1:]).sum(1)
    of_b, of_c = grad_bc[0].split(shared, dim=-1)
    of_a, of_d, of_bias = total[:, :-2], total[:, -2], total[:, -1]
    return ScanGradients(grad_step, of_b, of_c, of_a, of_d, of_bias)


def _cut(scan: Scan) -> tuple[int, int]:
    """(programs along the chunks, parts that a group's channels are cut into)."""
    resident = _RESIDENT * _multiprocessors(scan.u.device)
    others = scan.groups * scan.rows
    splits = 1
    while splits < scan.blocks and scan.chunks * others * splits < resident:
        splits += 1
    each = ceil_divide(scan.blocks, splits)
    splits = ceil_divide(scan.blocks, each)
    rounds = ceil_divide(scan.chunks * others * splits, resident)
    return ceil_divide(scan.chunks, rounds), splits
