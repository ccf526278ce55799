"""From tensors to kernels: arrays, plans, tasks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segmamba.ops._numba import conv_kernels, scan_kernels
from segmamba.ops._numba.conv_kernels import ConvPlan
from segmamba.ops._numba.plan import (
    ScanPlan,
    cut_tasks,
    state_shape,
    tile_count,
)
from segmamba.ops._numba.tasks import run_tasks
from segmamba.ops._numba.vectors import LANES

_NOTHING = np.empty(0, np.float32)


def flat(x: Tensor) -> np.ndarray:
    """A contiguous float32 tensor's memory as one row of floats."""
    return x.detach().numpy().reshape(-1)


class ScanInputs(NamedTuple):
    u: np.ndarray
    code: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    rates: np.ndarray
    matrix_b: np.ndarray
    matrix_c: np.ndarray
    skip: np.ndarray


def block_rates(A: Tensor) -> Tensor:
    """A / log(2) as (blocks, N, 16)."""
    rates = (A / math.log(2)).unflatten(0, (-1, LANES))
    return rates.transpose(1, 2).contiguous()


def run_scan(
    plan: ScanPlan, inputs: ScanInputs, out: Tensor, accumulate: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Scan; kept states (batch, tiles, blocks, N, 16) or empty, and the last ones."""
    starts = _segment_starts(plan, inputs)
    kept = torch.empty(state_shape(plan, plan.tiles) if keep else 0)
    last = torch.empty(state_shape(plan, 1))
    run_tasks(
        scan_kernels.scan_forward,
        plan.batch * plan.groups * plan.segments,
        plan,
        *inputs,
        flat(starts),
        flat(kept),
        flat(last),
        flat(out),
        int(accumulate),
    )
    return kept, last


def _segment_starts(plan: ScanPlan, inputs: ScanInputs) -> Tensor:
    starts = torch.zeros(state_shape(plan, plan.segments))
    if plan.segments == 1:
        return starts
    ends = torch.empty_like(starts)
    sums = torch.empty(plan.batch, plan.segments, plan.blocks, 1, LANES)
    run_tasks(
        scan_kernels.scan_segment_ends,
        plan.batch * plan.groups * plan.segments,
        plan,
        *inputs[:6],
        flat(ends),
        flat(sums),
    )
    rates = torch.from_numpy(inputs.rates).view(plan.blocks, plan.states, LANES)
    decays = torch.exp2(sums * rates)
    for s in range(1, plan.segments):
        starts[:, s] = decays[:, s - 1] * starts[:, s - 1] + ends[:, s - 1]
    return starts
