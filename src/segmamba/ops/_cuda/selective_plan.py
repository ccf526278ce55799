"""How selective scans are cut into blocks; see `selective.cu`."""

from __future__ import annotations

from dataclasses import dataclass

from segmamba.ops._cuda.launch import STATES, ceil_divide

KEPT = 32
"""Steps between states that the forward keeps."""

WARPS, LANES = 4, 32
"""Warps of a block that walks over steps, and their threads."""

SQUARE = 16
"""Channels of a warp that walks back for gradients."""

_SHORT = 1024
"""Steps that are walked at once, however few channels there are: for a moment only,
which two more launches and the gaps between them would take."""

_PER = (4, 2, 1)
"""States of a thread, if that makes enough of them."""

_TILE = 64
"""Steps that a walk loads at a time."""

_RESIDENT, _ENOUGH = 4, 1.75
"""Blocks of a walk that a multiprocessor holds, and as many as keep it at work when a
walk over whole rows saves the first of two."""

_HELD = 12
"""Warps that a multiprocessor holds of those that walk back for gradients."""


@dataclass(frozen=True)
class Plan:
    """How a scan is cut up.

    Attributes:
        per: States of a thread of a walk.
        blocks: Blocks of a walk side by side over channels.
        steps: Of a segment of the forward.
        segments: Number of those.
        warps: Of a block that gives gradients.
        parts: Such blocks that share a group's B and C.
        back_steps: Of a segment that such a block does, a multiple of `KEPT`.
        back_segments: Number of those.
    """

    per: int
    blocks: int
    steps: int
    segments: int
    warps: int
    parts: int
    back_steps: int
    back_segments: int


def plan_for(sizes: tuple[int, int, int, int], processors: int, warps: int) -> Plan:
    """Cut a scan up: whole rows where channels alone fill the GPU, or rows are short.

    Args:
        sizes: Cases, groups of channels with a B and C of their own, channels of each,
            and steps.
        processors: Multiprocessors of the GPU.
        warps: Of a block that gives gradients.
    """
    batch, groups, per_group, length = sizes

    def blocks(per: int) -> int:
        return groups * ceil_divide(per_group, WARPS * LANES * per // STATES)

    enough = _ENOUGH * processors
    alone = next((per for per in _PER if batch * blocks(per) >= enough), 0)
    if alone or length <= _SHORT:
        per, steps = alone or 1, length
    else:
        per = _PER[0]
        room = _RESIDENT * processors // (batch * blocks(per))
        steps = _even(length, _TILE, room)
    parts = ceil_divide(per_group, SQUARE * warps)
    room = _HELD // warps * processors // (batch * groups * parts)
    back_steps = _even(length, KEPT, room)
    return Plan(
        per=per,
        blocks=blocks(per),
        steps=steps,
        segments=ceil_divide(length, steps),
        warps=warps,
        parts=parts,
        back_steps=back_steps,
        back_segments=ceil_divide(length, back_steps),
    )


def _even(length: int, unit: int, most: int) -> int:
    """Steps of segments, whole units, of which there are at most so many."""
    units = ceil_divide(length, unit)
    return unit * ceil_divide(units, max(1, min(units, most)))
