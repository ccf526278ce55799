"""How long a call takes, and how much memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from segmamba.nn.footprint import LiveBytes
from segmamba.types import JsonDict

Run = Callable[[], object]

Result = TypeVar("Result")

WARM_UP = 3
"""Calls before any is timed; the first ones compile and search for algorithms."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200

SLOW_MS = 2000.0
"""A call that takes longer is timed three times only."""


def measure(
    make: Callable[[], Run], device: torch.device, seconds: float, baseline: int
) -> JsonDict:
    """Time a call and take its peak memory.

    Args:
        make: Builds what is needed and gives the call, whose result is dropped at once.
        device: Where it computes.
        seconds: Time for all rounds together; there are 5 to 200 of them, or 3 of a
            call that takes seconds.
        baseline: Bytes that were allocated on the GPU before anything of this
            measurement was made.

    Returns:
        `median_ms`, `quartiles_ms`, `min_ms`, `max_ms`, `rounds`; `peak_mib`, the most
        that parameters, inputs and the call held together, and `peak_above_mib`, the
        part above what was held before the call. On a CPU these are counted: the bytes
        of all tensors that operators made and nobody had freed.
    """
    run, memory = _on_gpu(make, device, baseline) if _is_gpu(device) else _counted(make)
    timer = _cuda_ms if device.type == "cuda" else _cpu_ms
    estimate = max(timer(run, 1)[0], 1e-3)
    least = 3 if estimate > SLOW_MS else MIN_ROUNDS
    rounds = int(min(max(1000 * seconds / estimate, least), MAX_ROUNDS))
    return {**summary(timer(run, rounds)), **memory}


def captured(run: Callable[[], Result]) -> tuple[Run, Result]:
    """Capture a call as a CUDA graph.

    Args:
        run: The call, on tensors that stay where they are.

    Returns:
        What replays it, and the result that each replay writes anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def summary(milliseconds: list[float]) -> JsonDict:
    """Give median, quartiles and range of times in milliseconds."""
    low, _, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive")
        if len(milliseconds) > 1
        else milliseconds * 3
    )
    return {
        "median_ms": statistics.median(milliseconds),
        "quartiles_ms": [low, high],
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "rounds": len(milliseconds),
    }


def allocated(device: torch.device) -> int:
    """Drop what is unreachable and give the GPU bytes in use; 0 on other devices."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_gpu(
    make: Callable[[], Run], device: torch.device, baseline: int
) -> tuple[Run, JsonDict]:
    run = make()
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return run, _in_mib(peak - baseline, peak - before)


def _counted(make: Callable[[], Run]) -> tuple[Run, JsonDict]:
    with LiveBytes() as live:
        run = make()
        before = live.now
        run()
    return run, _in_mib(live.peak, live.peak - before)


def _in_mib(peak: int, above: int) -> JsonDict:
    return {
        "peak_mib": round(peak / 2**20, 1),
        "peak_above_mib": round(above / 2**20, 1),
    }


def _cuda_ms(run: Run, rounds: int) -> list[float]:
    """Time between events around each call, on the GPU's own clock."""
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)
    ]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _cpu_ms(run: Run, rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - begin))
    return taken
