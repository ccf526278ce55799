"""How a scan is cut into tasks, and the numbers that its kernels need."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segmamba.ops._layout import LANES, TILE

# A segment that starts in the middle needs its first state, which costs one more walk.
_EXTRA_WALK = 0.8


class ScanPlan(NamedTuple):
    """Sizes, layouts and cuts of one scan; plain integers, as kernels take them.

    A task is one case, one group of channel blocks, one segment of tiles. A block is 16
    channels. Rows of u have `blocks` blocks; rows of code, B and C lie anywhere in their
    arrays: row p of case b starts at (b * length + p) * width + first.
    """

    batch: int
    length: int
    blocks: int
    states: int
    rank: int
    """Columns of the step sizes' code; 0 where step sizes are given themselves."""
    stride: int
    reverse: int
    blocks_per_matrix: int
    """Blocks that share one B and C."""
    b_width: int
    b_first: int
    c_width: int
    c_first: int
    code_width: int
    tiles: int
    groups: int
    segments: int


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


def state_shape(plan: ScanPlan, places: int) -> tuple[int, int, int, int, int]:
    """Shape of an array of states.

    Args:
        plan: The scan's plan.
        places: Positions of the sequence at which states are kept.

    Returns:
        (batch, places, blocks, N, 16).
    """
    return plan.batch, places, plan.blocks, plan.states, LANES
