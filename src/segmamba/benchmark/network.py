"""The whole network: training step and inference, beside others; size by size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import nn

from segmamba.benchmark.model import (
    build,
    check_network,
    draw_target,
    draw_volume,
    graph_run,
    inference_run,
    training_run,
)
from segmamba.benchmark.peers import usable_peers
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.timing import Run, captured
from segmamba.nn import count_parameters
from segmamba.types import Size3

SIDE, QUICK_SIDE = 128, 16
"""Side of the volume that networks are compared on."""

VOLUME: Size3 = (160, 240, 240)
"""A BraTS volume along (D, H, W), its 155 slices rounded up to the strides."""

QUICK_VOLUME: Size3 = (16, 24, 24)

SIDES = (64, 96, 128, 160, 192, 224, 256)
QUICK_SIDES = (8, 16)


def benchmark_network(record: Record) -> None:
    """Time a training step of two volumes and inference of one, peers beside it.

    Args:
        record: Where the rows go. Peers are timed at the same precision on the same
            volumes.
    """
    settings = record.settings
    side = QUICK_SIDE if settings.quick else SIDE
    if check_network(record, training=True):
        _time_both(record, OURS, lambda: build(settings), side)
        _time_training(
            record,
            OURS,
            lambda: build(settings, checkpointing=True),
            side,
            "training step, checkpointing",
        )
        if record.device.type == "cuda":
            _time_training(
                record, OURS, lambda: build(settings), side, "training step, CUDA graph"
            )
            _time_inference(
                record, OURS, lambda: build(settings), side, "inference, CUDA graph"
            )
    for name, network in usable_peers(record).items():
        _time_both(record, name, lambda it=network: copy.deepcopy(it), side)


def benchmark_volume(record: Record) -> None:
    """Time one whole brain volume in a single pass, without windows."""
    settings = record.settings
    size = QUICK_VOLUME if settings.quick else VOLUME
    if check_network(record):
        _time_size(record, size, "x".join(map(str, size)))


def benchmark_size(record: Record) -> None:
    """Time inference of cubes of growing side; keep the time per voxel.

    The record gets "cost_over_base": each side's time per voxel over that at
    "base_side", 128.
    """
    if not check_network(record):
        return
    costs = {}
    for side in QUICK_SIDES if record.settings.quick else SIDES:
        row = _time_size(record, (side, side, side), f"{side}^3")
        if "ns_per_voxel" in row:
            costs[side] = row["ns_per_voxel"]
    base = QUICK_SIDE if record.settings.quick else SIDE
    if base in costs:
        ratios = {str(side): cost / costs[base] for side, cost in costs.items()}
        record.data |= {"base_side": base, "cost_over_base": ratios}


def _time_size(record: Record, size: Size3, case: str) -> dict:
    settings = record.settings

    def make() -> Run:
        return inference_run(build(settings), settings, draw_volume(settings, 1, size))

    row = record.time(OURS, case, "inference", make, shape=[1, 4, *size])
    if "median_ms" in row:
        row["ns_per_voxel"] = 1e6 * row["median_ms"] / math.prod(size)
    return row


def _time_both(
    record: Record, subject: str, make_network: Callable[[], nn.Module], side: int
) -> None:
    _time_training(record, subject, make_network, side, "training step")
    _time_inference(record, subject, make_network, side, "inference")


def _time_training(
    record: Record,
    subject: str,
    make_network: Callable[[], nn.Module],
    side: int,
    mode: str,
) -> None:
    settings, size = record.settings, (side, side, side)

    def make() -> Run:
        volume, target = draw_volume(settings, 2, size), draw_target(settings, 2, size)
        run = training_run(make_network(), settings, volume, target)
        return captured(run)[0] if "graph" in mode else run

    record.time(subject, f"2x4x{side}^3", mode, make, shape=[2, 4, *size])


def _time_inference(
    record: Record,
    subject: str,
    make_network: Callable[[], nn.Module],
    side: int,
    mode: str,
) -> None:
    settings, size = record.settings, (side, side, side)
    parameters = 0

    def make() -> Run:
        nonlocal parameters
        network = make_network()
        parameters = count_parameters(network)
        volume = draw_volume(settings, 1, size)
        prepare = graph_run if "graph" in mode else inference_run
        return prepare(network, settings, volume)

    row = record.time(subject, f"1x4x{side}^3", mode, make, shape=[1, 4, *size])
    row["parameters"] = parameters
