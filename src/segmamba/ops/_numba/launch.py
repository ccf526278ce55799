"""From tensors to kernels: arrays, plans, tasks.

Tensors here are float32, contiguous, with channels in multiples of 16 and states in
multiples of 4; `padding.py` sees to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segmamba.ops._layout import LANES
from segmamba.ops._numba import (
    conv_kernels,
    projection_kernels,
    scan_backward_kernels,
    scan_kernels,
)
from segmamba.ops._numba.plan import (
    ConvPlan,
    ScanPlan,
    cut_tasks,
    state_shape,
    task_count,
    tile_count,
)
from segmamba.ops._numba.tasks import run_tasks

# So many tasks a case: enough for many cores, and the same sums whatever their number.
_CONV_TASKS = 16


class ScanInputs(NamedTuple):
    """What the scan's kernels read; see `ScanPlan` for the layouts."""

    u: Tensor
    code: Tensor
    weight: Tensor
    """(rank, E)."""
    bias: Tensor
    rates: Tensor
    """A / log(2), (blocks, N, 16)."""
    matrix_b: Tensor
    matrix_c: Tensor
    skip: Tensor


class ScanGradients(NamedTuple):
    """Gradients of a scan, summed over cases where the input has none."""

    before: Tensor
    """The adjoint before the slab."""
    steps: Tensor
    """Of given step sizes, (batch, L, E); empty where they come from a code."""
    A: Tensor
    """(E, N)."""
    weight: Tensor
    bias: Tensor
    skip: Tensor
    matrices: Tensor
    """Of code, B and C side by side, for each group of channels by itself:
    (groups, batch, pitch, rank + 2 G N)."""


def flat(x: Tensor) -> np.ndarray:
    """A contiguous tensor's memory as one row of numbers.

    Args:
        x: Contiguous CPU tensor.

    Returns:
        One-dimensional array on the same memory.
    """
    return x.detach().numpy().reshape(-1)


def block_rates(A: Tensor) -> Tensor:
    """Bring decay rates into the kernels' form.

    Args:
        A: (E, N).

    Returns:
        A / log(2) as (blocks, N, 16).
    """
    return (A / math.log(2)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def scan_plan(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    slab: tuple[int, int] | None = None,
    pitch: int | None = None,
    rank: int = 0,
    width: int | None = None,
    order: tuple[int, bool] = (1, False),
    matrices: int = 1,
) -> ScanPlan:
    """Plan a scan.

    Args:
        batch: Cases.
        length: L.
        channels: E.
        states: N.
        slab: First position, a multiple of the tile, and number of positions; None
            for all.
        pitch: Rows from case to case in arrays by position; None for L.
        rank: Columns of the step sizes' code; with it, code, B and C lie side by side.
            0: step sizes, B and C are arrays (batch, L, E), (batch, L, G, N).
        width: Floats of a row of the array with code, B and C; None for G N.
        order: (stride, reverse) of the rows that y goes to.
        matrices: G, groups of channels with a B and C of their own.

    Returns:
        The plan, with tasks for torch's present number of threads.
    """
    blocks = channels // LANES
    offset, rows = (0, length) if slab is None else slab
    groups, segments = cut_tasks(batch, blocks, rows)
    return ScanPlan(
        batch=batch,
        length=length,
        offset=offset,
        rows=rows,
        pitch=length if pitch is None else pitch,
        blocks=blocks,
        states=states,
        rank=rank,
        stride=order[0],
        reverse=int(order[1]),
        blocks_per_matrix=blocks // matrices,
        width=matrices * states if width is None else width,
        b_first=rank,
        c_first=rank + states if rank else 0,
        tiles=tile_count(rows),
        all_tiles=tile_count(length),
        groups=groups,
        segments=segments,
    )


def run_scan(
    plan: ScanPlan,
    inputs: ScanInputs,
    first: Tensor,
    kept: Tensor,
    out: Tensor,
    *,
    accumulate: bool,
) -> Tensor:
    """Scan a slab.

    Args:
        plan: The scan's plan.
        inputs: Its inputs.
        first: States before the slab, (batch, 1, blocks, N, 16).
        kept: (batch, tiles, blocks, N, 16), written for `run_scan_backward`, or empty.
        out: (batch, L, E) in token order, written or added to.
        accumulate: Add to `out`.

    Returns:
        States after the slab, as `first`.
    """
    last = torch.empty_like(first)
    starts = _segment_starts(plan, inputs, first)
    run_tasks(
        scan_kernels.scan_forward,
        task_count(plan),
        plan,
        *map(flat, (*inputs, starts, kept, last, out)),
        int(accumulate),
    )
    return last


def _segment_starts(plan: ScanPlan, inputs: ScanInputs, first: Tensor) -> Tensor:
    """States before each segment, (batch, segments, blocks, N, 16)."""
    if plan.segments == 1:
        return first
    ends = torch.empty(state_shape(plan, plan.segments))
    sums = torch.empty(plan.batch, plan.segments, plan.blocks, 1, LANES)
    run_tasks(
        scan_kernels.scan_segment_ends,
        task_count(plan),
        plan,
        *map(flat, (*inputs[:6], ends, sums)),
    )
    decays = torch.exp2(sums * inputs.rates)
    starts = torch.empty_like(ends)
    starts[:, 0] = first[:, 0]
    for s in range(1, plan.segments):
        starts[:, s] = decays[:, s - 1] * starts[:, s - 1] + ends[:, s - 1]
    return starts


def _segment_ends(
    plan: ScanPlan, inputs: ScanInputs, grad_y: Tensor, behind: Tensor
) -> Tensor:
    """Adjoints that enter each segment from behind."""
    if plan.segments == 1:
        return behind
    begins = torch.empty(state_shape(plan, plan.segments))
    sums = torch.empty(plan.batch, plan.segments, plan.blocks, 1, LANES)
    run_tasks(
        scan_backward_kernels.adjoint_segment,
        task_count(plan),
        plan,
        *map(flat, (grad_y, *inputs[1:5], inputs.matrix_c, begins, sums)),
    )
    decays = torch.exp2(sums * inputs.rates)
    ends = torch.empty_like(begins)
    ends[:, -1] = behind[:, 0]
    for s in range(plan.segments - 1, 0, -1):
        ends[:, s - 1] = decays[:, s] * ends[:, s] + begins[:, s]
    return ends


def partial_sums(plan: ScanPlan) -> Tensor:
    """Memory for `run_scan_backward`.

    Args:
        plan: A plan; those of other slabs may use the same memory.

    Returns:
        (blocks, batch, pitch, rank + 2 G N), of which a slab uses `groups` first ones.
    """
    matrices = plan.blocks // plan.blocks_per_matrix
    width = plan.rank + 2 * matrices * plan.states
    return torch.empty(plan.blocks, plan.batch, plan.pitch, width)


def run_scan_backward(
    plan: ScanPlan,
    inputs: ScanInputs,
    kept: Tensor,
    grad_y: Tensor,
    behind: Tensor,
    grad_u: Tensor,
    partial: Tensor,
) -> ScanGradients:
    """Differentiate `run_scan`.

    Args:
        plan: The scan's plan.
        inputs: Its inputs.
        kept: States that `run_scan` kept.
        grad_y: (batch, L, E) in token order.
        behind: Adjoint after the slab, (batch, 1, blocks, N, 16).
        grad_u: (batch, pitch, E), written.
        partial: From `partial_sums`, overwritten.

    Returns:
        The other gradients, and the adjoint before the slab.
    """
    parts, channels = plan.batch * plan.segments, plan.blocks * LANES
    steps = torch.empty(0 if plan.rank else inputs.u.shape)
    rates = torch.zeros(parts, *inputs.rates.shape)
    weight = torch.zeros(parts, plan.rank, channels)
    bias, skip = torch.zeros(parts, channels), torch.zeros(parts, channels)
    if plan.blocks_per_matrix < plan.blocks:
        partial[: plan.groups].zero_()
    before = torch.empty_like(behind)
    ends = _segment_ends(plan, inputs, grad_y, behind)
    outputs = (before, grad_u, steps, rates, weight, bias, skip, partial)
    run_tasks(
        scan_backward_kernels.scan_backward,
        task_count(plan),
        plan,
        *map(flat, (*inputs, kept, ends, grad_y, *outputs)),
    )
    return ScanGradients(
        before=before,
        steps=steps,
        A=rates.sum(0).transpose(1, 2).flatten(0, 1),
        weight=weight.sum(0),
        bias=bias.sum(0),
        skip=skip.sum(0),
        matrices=partial[: plan.groups],
    )


def conv_plan(
    x: Tensor,
    channels: int,
    order: tuple[int, bool],
    *,
    slab: tuple[int, int] | None = None,
    pitch: int | None = None,
    columns: int = 0,
    silu: bool = True,
) -> ConvPlan:
    """Plan a convolution of the first `channels` columns of x (batch, L, width).

    Args:
        x: Rows in token order.
        channels: E.
        order: (stride, reverse) in which rows are walked.
        slab: First position and number of positions; None for all.
        pitch: Rows from case to case in arrays by position; None for L.
        columns: Columns of a projection to follow, a multiple of 16.
        silu: Put silu on the result.

    Returns:
        The plan.
    """
    batch, length, width = x.shape
    offset, rows = (0, length) if slab is None else slab
    tiles = tile_count(rows)
    return ConvPlan(
        batch=batch,
        length=length,
        offset=offset,
        rows=rows,
        pitch=length if pitch is None else pitch,
        blocks=channels // LANES,
        stride=order[0],
        reverse=int(order[1]),
        x_width=width,
        columns=columns,
        silu=int(silu),
        tiles=tiles,
        tasks=min(_CONV_TASKS, tiles),
    )


def run_conv(
    plan: ConvPlan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    u: Tensor,
    projection: Tensor | None = None,
    code: Tensor | None = None,
) -> None:
    """Convolve, and project the result.

    Args:
        plan: The convolution's plan.
        x: (batch, L, width), token order.
        weight: (4, E).
        bias: (E).
        u: (batch, pitch, E), by position; written.
        projection: (E, columns), if the plan has columns.
        code: (batch, pitch, columns); written.
    """
    nothing = bias[:0]
    if projection is None or code is None:
        projection = code = nothing
    count = plan.batch * plan.tasks
    tensors = (x, weight, bias, projection, u, code)
    run_tasks(conv_kernels.conv_forward, count, plan, *map(flat, tensors))


def run_conv_backward(
    plan: ConvPlan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_u: Tensor,
    grad_x: Tensor,
    *,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """Differentiate `run_conv` without its projection.

    Args:
        plan: The convolution's plan.
        x: As in `run_conv`.
        weight: As in `run_conv`.
        bias: As in `run_conv`.
        grad_u: (batch, pitch, E), by position, with the 3 rows after the slab.
        grad_x: As x; of its first E columns the slab's rows are written or added to.
        accumulate: Add to `grad_x`.

    Returns:
        Gradients of weight (4, E) and bias (E).
    """
    count = plan.batch * plan.tasks
    grad_weight, grad_bias = (torch.zeros(count, *w.shape) for w in (weight, bias))
    run_tasks(
        conv_kernels.conv_backward,
        count,
        plan,
        *map(flat, (x, weight, bias, grad_u, grad_x)),
        int(accumulate),
        *map(flat, (grad_weight, grad_bias)),
    )
    return grad_weight.sum(0), grad_bias.sum(0)


def run_projection_backward(
    plan: ConvPlan,
    matrices: Tensor,
    projection: Tensor,
    u: Tensor,
    grad_u: Tensor,
    gradient: Tensor,
) -> None:
    """Differentiate the projection in `run_conv`.

    Args:
        plan: The convolution's plan.
        matrices: Gradients of the projected rows, (groups, batch, pitch, width).
        projection: Its transpose, (width padded to a multiple of 8, E).
        u: (batch, pitch, E).
        grad_u: (batch, pitch, E), added to.
        gradient: (tasks at least, padded width, E), to whose sum over tasks the
            gradient of `projection` is added. Summed once for all slabs, because that
            wakes torch's threads.
    """
    groups, width = matrices.shape[0], matrices.shape[-1]
    run_tasks(
        projection_kernels.projection_backward,
        plan.batch * plan.tasks,
        plan,
        groups,
        width,
        *map(flat, (matrices, projection, u, grad_u, gradient)),
    )


def run_gate(plan: ConvPlan, y: Tensor, xz: Tensor, out: Tensor) -> None:
    """Multiply by silu(z).

    Args:
        plan: Any plan of a convolution of xz.
        y: (batch, L, E).
        xz: (batch, L, 2E), z last.
        out: (batch, L, E), written; may be y.
    """
    count = plan.batch * plan.tasks
    run_tasks(conv_kernels.gate_forward, count, plan, *map(flat, (y, xz, out)))


def run_gate_backward(
    plan: ConvPlan, grad: Tensor, y: Tensor, xz: Tensor, grad_xz: Tensor
) -> Tensor:
    """Differentiate `run_gate`.

    Args:
        plan: Any plan of a convolution of xz.
        grad: Gradient of the gated rows, (batch, L, E).
        y: Rows before the gate.
        xz: (batch, L, 2E).
        grad_xz: (batch, L, 2E); its last E columns are written.

    Returns:
        Gradient of y.
    """
    grad_y = torch.empty_like(y)
    arrays = map(flat, (grad, y, xz, grad_y, grad_xz))
    count = plan.batch * plan.tasks
    run_tasks(conv_kernels.gate_backward, count, plan, *arrays)
    return grad_y
