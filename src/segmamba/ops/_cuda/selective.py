"""Launches of the selective scan's kernels; see `selective.cu`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from segmamba.ops._cuda.compiler import Kernel, kernel
from segmamba.ops._cuda.launch import KINDS, STATES, ceil_divide, multiprocessors
from segmamba.ops._cuda.selective_plan import KEPT, LANES, SQUARE, WARPS, plan_for
from segmamba.ops._layout import ScanInputs

_STRANDS, _FINISHERS = 32, 8
"""Parts of what is carried over segments, and of what is summed over them."""

_MOST_FINISHERS = 4096
"""Blocks that sum the gradients of B and C."""


@functools.cache
def _warps(device: torch.device) -> int:
    """Warps of a gradients' block: as its shared memory allows."""
    if device.type != "cuda":
        return WARPS
    return 2 if torch.cuda.get_device_capability(device) == (7, 5) else WARPS


class Work:
    """The plan for scans of a form, and their kernels.

    Args:
        shape: (batch, E, L).
        groups: Groups of channels with a B and C of their own.
        states: N.
        gated: There is z.
        aligned: All rows begin on 16 bytes.
        dtype: Of tensors of steps.
        device: Of all tensors.
    """

    def __init__(
        self,
        shape: torch.Size,
        groups: int,
        states: int,
        gated: bool,
        aligned: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch, self.channels, length = shape
        self.groups, self.states, self.gated = groups, states, gated
        per_group = self.channels // groups
        self.plan = plan = plan_for(
            (self.batch, groups, per_group, length),
            multiprocessors(device),
            _warps(device),
        )
        numbers = length, self.channels, states, per_group
        self.sizes = *numbers, plan.steps, plan.segments
        self.back_sizes = *numbers, plan.back_steps, plan.back_segments
        self._device = device
        self._constants = {"KIND": KINDS[dtype]}
        if aligned:
            self._constants["ALIGNED"] = 1

    def _walk(self, name: str) -> Kernel:
        constants = {**self._constants, "WARPS": WARPS, "PER": self.plan.per}
        return kernel("selective.cu", name, self._device, **constants)

    @functools.cached_property
    def scan_ends(self) -> Kernel:
        return self._walk("scan_ends")

    @functools.cached_property
    def scan_outputs(self) -> Kernel:
        return self._walk("scan_outputs")

    @functools.cached_property
    def scan_adjoints(self) -> Kernel:
        return self._walk("scan_adjoints")

    @functools.cached_property
    def carry(self) -> Kernel:
        constants = {"WARPS": WARPS, "SEGMENTS": _STRANDS}
        return kernel("selective.cu", "carry", self._device, **constants)

    @functools.cached_property
    def scan_gradients(self) -> Kernel:
        constants = {**self._constants, "WARPS": self.plan.warps}
        if self.gated:
            constants["GATED"] = 1
        file = "selective_backward.cu"
        return kernel(file, "scan_gradients", self._device, **constants)

    @functools.cached_property
    def finish(self) -> Kernel:
        constants = {"KIND": self._constants["KIND"], "SEGMENTS": _FINISHERS}
        file = "selective_backward.cu"
        return kernel(file, "finish", self._device, WARPS=WARPS, **constants)

    def new_slots(self, like: Tensor, segments: int) -> Tensor:
        """Memory for states between segments, and for sums of step sizes."""
        return like.new_empty(self.batch * segments * self.channels * (STATES + 1))


_work_for = functools.lru_cache(maxsize=256)(Work)


def _work(inputs: ScanInputs, *others: Tensor) -> Work:
    u, delta, A, B, C, _, z, _ = inputs
    aligned = u.shape[2] % 4 == 0
    for x in (u, delta, B, C, z, *others):
        aligned = aligned and (x is None or x.data_ptr() % 16 == 0)
    groups = B.shape[1] if B.ndim == 4 else 1
    form = groups, A.shape[1], z is not None, aligned, u.dtype, u.device
    return _work_for(u.shape, *form)


def scan(
    inputs: ScanInputs, softplus: bool, last: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan.

    Args:
        inputs: The tensors, N at most 16.
        softplus: Put softplus on delta and bias.
        last: Give the last state.
        keep: Keep states for the backward.

    Returns:
        (batch, E, L); the last state (batch, E, N) and the kept ones (`kept_shape`),
        each empty if it isn't wanted.
    """
    u, delta, A, B, C, D, z, bias = inputs
    work, y, slots = _work(inputs), torch.empty_like(u), None
    plan, softly = work.plan, int(softplus)
    states = A.new_empty((work.batch, *A.shape) if last else 0)
    kept = A.new_empty(kept_shape(u) if keep else 0)
    if plan.segments > 1:
        slots = work.new_slots(A, plan.segments)
        work.scan_ends(
            (plan.segments - 1, plan.blocks, work.batch),
            LANES * WARPS,
            u,
            delta,
            B,
            A,
            bias,
            slots,
            softly,
            *work.sizes,
        )
        _carry(work, slots, A, None, plan.segments, back=False)
    work.scan_outputs(
        (plan.segments, plan.blocks, work.batch),
        LANES * WARPS,
        u,
        delta,
        z,
        B,
        C,
        A,
        D,
        bias,
        slots,
        kept if keep else None,
        states if last else None,
        y,
        softly,
        *work.sizes,
    )
    return y, states, kept


def _carry(
    work: Work,
    slots: Tensor,
    A: Tensor,
    first: Tensor | None,
    segments: int,
    *,
    back: bool,
) -> None:
    """Sum what segments add into states between them."""
    work.carry(
        (ceil_divide(work.channels * STATES, LANES), 1, work.batch),
        LANES * _STRANDS,
        slots,
        A,
        first,
        work.channels,
        work.states,
        segments,
        int(back),
    )


def kept_shape(u: Tensor) -> tuple[int, ...]:
    """Shape of the states kept for u (batch, E, L)."""
    batch, channels, length = u.shape
    return batch, -(-length // KEPT), channels, STATES


def scan_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    inputs: ScanInputs,
    kept: Tensor,
    softplus: bool,
) -> list[Tensor]:
    """Differentiate `scan`.

    Args:
        grad: Gradient of the output.
        grad_last: Of the last state; None for zero.
        inputs: As in `scan`.
        kept: States that it kept.
        softplus: As in `scan`.

    Returns:
        Gradients of the inputs; empty for what is None.
    """
    u, delta, A, B, C, D, z, bias = inputs
    work = _work(inputs, grad)
    plan, softly, adjoints = work.plan, int(softplus), None
    if plan.back_segments > 1:
        adjoints = _adjoints(work, grad, grad_last, inputs, softly)
    found = [A.new_empty(0) if x is None else torch.empty_like(x) for x in inputs]
    of_u, of_delta, _, of_B, of_C, _, of_z, _ = found
    sums = A.new_empty(work.batch * plan.back_segments, (STATES + 2) * work.channels)
    shares = None
    if plan.parts > 1:
        shares = A.new_empty(plan.parts, 2, B.numel())
    work.scan_gradients(
        (plan.back_segments, work.groups * plan.parts, work.batch),
        LANES * plan.warps,
        grad,
        u,
        delta,
        z,
        B,
        C,
        A,
        D,
        bias,
        kept,
        adjoints,
        grad_last,
        of_u,
        of_delta,
        of_z,
        of_B,
        of_C,
        shares,
        sums,
        softly,
        *work.back_sizes,
        shared=_shared_bytes(plan.warps, work.gated),
    )
    _finish(work, inputs, sums, shares, found)
    return found


def _adjoints(
    work: Work,
    grad: Tensor,
    grad_last: Tensor | None,
    inputs: ScanInputs,
    softly: int,
) -> Tensor:
    """Adjoints behind segments, walked back at once, or by segments as the forward."""
    plan = work.plan
    whole = plan.segments == 1
    slots = work.new_slots(inputs.A, plan.back_segments)
    work.scan_adjoints(
        (1 if whole else plan.back_segments - 1, plan.blocks, work.batch),
        LANES * WARPS,
        grad,
        inputs.delta,
        inputs.z,
        inputs.C,
        inputs.A,
        inputs.bias,
        grad_last if whole else None,
        slots,
        work.sizes[0] if whole else plan.back_steps,
        softly,
        *work.back_sizes,
    )
    if not whole:
        _carry(work, slots, inputs.A, grad_last, plan.back_segments, back=True)
    return slots


def _finish(
    work: Work,
    inputs: ScanInputs,
    sums: Tensor,
    shares: Tensor | None,
    found: list[Tensor],
) -> None:
    """Sum what blocks found for the parameters, and for B and C."""
    _, _, of_A, of_B, of_C, of_D, _, of_bias = found
    blocks = ceil_divide(sums.shape[1], LANES)
    if shares is not None:
        many = ceil_divide(of_B.numel(), LANES * _FINISHERS)
        blocks = max(blocks, min(many, _MOST_FINISHERS))
    work.finish(
        (blocks, 1 if shares is None else 2, 1),
        LANES * _FINISHERS,
        sums,
        shares,
        of_A,
        None if inputs.D is None else of_D,
        None if inputs.bias is None else of_bias,
        of_B,
        of_C,
        sums.shape[0],
        work.channels,
        work.states,
        work.plan.parts,
        work.batch * work.groups,
        work.sizes[0],
    )


def _shared_bytes(warps: int, gated: bool) -> int:
    """Size of the gradients' kernel's shared memory: struct Memory."""
    pitch = KEPT + 4
    rows = (4 if gated else 3) * SQUARE * pitch
    left = KEPT // 4 * (2 * LANES * 4 + 4)
    return 4 * (2 * STATES * pitch + warps * (rows + left))
