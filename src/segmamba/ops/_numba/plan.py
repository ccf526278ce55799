"""How a scan is cut into tasks, and the numbers that its kernels need."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segmamba.ops._layout import LANES, TILE

# A segment that starts in the middle needs its first state, which costs one more walk.
_EXTRA_WALK = 0.8


class ScanPlan(NamedTuple):
    """Sizes, layouts and cuts of one slab of a scan; plain integers for kernels.

    A slab is the positions offset .. offset + rows - 1 of all cases. A task is one
    case, one group of channel blocks, one segment of the slab's tiles. A block is 16
    channels.

    u, the gradient of u, and the arrays that hold code, B and C are by position: row t
    of the slab of case b is row b * pitch + t. What goes to and comes from tokens has
    all L rows.
    """

    batch: int
    length: int
    offset: int
    rows: int
    pitch: int
    blocks: int
    states: int
    rank: int
    """Columns of the step sizes' code; 0 where step sizes are given themselves."""
    stride: int
    reverse: int
    blocks_per_matrix: int
    """Blocks that share one B and C."""
    width: int
    """Floats of a row of the array that holds code, B and C, or of one with B or C."""
    b_first: int
    c_first: int
    tiles: int
    all_tiles: int
    groups: int
    segments: int


class ConvPlan(NamedTuple):
    """Sizes and layout of one slab of a convolution; plain integers for kernels.

    Row t of the slab of case b is row b * pitch + t of u and of the projection.
    """

    batch: int
    length: int
    offset: int
    rows: int
    pitch: int
    blocks: int
    stride: int
    reverse: int
    x_width: int
    """Floats of a row of x, of which the first `blocks` blocks are meant."""
    columns: int
    """Floats of a row of the projection, a multiple of 16; 0 for none."""
    silu: int
    tiles: int
    tasks: int
    """Tasks of a case."""


def tile_count(length: int) -> int:
    """Tiles that cover a sequence.

    Args:
        length: Steps.

    Returns:
        Number of tiles, the last one maybe short.
    """
    return -(-length // TILE)


def cut_tasks(batch: int, blocks: int, length: int) -> tuple[int, int]:
    """Choose channel groups and segments so that all of torch's threads have work.

    Args:
        batch: Cases.
        blocks: Blocks of 16 channels.
        length: Steps.

    Returns:
        Groups of blocks and segments of tiles, with the least estimated time.
    """
    threads = torch.get_num_threads()
    tiles = tile_count(length)
    best = (float("inf"), 1, 1)
    for segments in {1, 2, 4, 8, 16, 32, 64}:
        if segments > 1 and segments * 4 > tiles:
            continue
        walk = (1.0 if segments == 1 else 1.0 + _EXTRA_WALK) / segments
        for groups in range(1, blocks + 1):
            rounds = -(-batch * groups * segments // threads)
            best = min(best, (rounds * -(-blocks // groups) * walk, groups, segments))
    return best[1], best[2]


def task_count(plan: ScanPlan) -> int:
    """Tasks of a plan.

    Args:
        plan: The scan's plan.

    Returns:
        Cases times groups times segments.
    """
    return plan.batch * plan.groups * plan.segments


def state_shape(plan: ScanPlan, places: int) -> tuple[int, int, int, int, int]:
    """Shape of an array of states.

    Args:
        plan: The scan's plan.
        places: Positions of the sequence at which states are kept.

    Returns:
        (batch, places, blocks, N, 16).
    """
    return plan.batch, places, plan.blocks, plan.states, LANES
