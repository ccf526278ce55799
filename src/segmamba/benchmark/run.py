"""Benchmarks by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from segmamba.benchmark.efficiency import benchmark_efficiency
from segmamba.benchmark.environment import fixed_arithmetic
from segmamba.benchmark.layer import benchmark_layer
from segmamba.benchmark.network import (
    benchmark_network,
    benchmark_size,
    benchmark_volume,
)
from segmamba.benchmark.record import Record, Say
from segmamba.benchmark.scan import benchmark_scan
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.errors import ConfigError, describe


def _predict(record: Record) -> None:
    # The others need neither file formats nor what reads them.
    from segmamba.benchmark.predict import benchmark_predict

    benchmark_predict(record)


def _feeding(record: Record) -> None:
    from segmamba.benchmark.feeding import benchmark_feeding

    benchmark_feeding(record)


BENCHMARKS: dict[str, tuple[str, Callable[[Record], None]]] = {
    "layer": (
        "three-directional layer of preset segmamba at its four stages",
        benchmark_layer,
    ),
    "network": (
        "preset segmamba: training step and inference, peers beside it",
        benchmark_network,
    ),
    "volume": ("one 240x240x160 volume in a single pass", benchmark_volume),
    "size": ("inference against the side of the volume", benchmark_size),
    "predict": (
        "one BraTS case end to end: four files to a label map",
        _predict,
    ),
    "feeding": (
        "training steps a second: batch that stays, real ones, augmented ones",
        _feeding,
    ),
    "efficiency": (
        "what mixes the tokens of the same encoder: cost of each",
        benchmark_efficiency,
    ),
    "scan": ("selective scan alone, mamba_ssm's kernel beside it", benchmark_scan),
}
"""What each benchmark measures, and the function that does it."""


def run_benchmark(
    name: str,
    settings: BenchmarkSettings | None = None,
    *,
    out: Path | str | None = None,
    say: Say | None = None,
) -> Record:
    """Run a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        settings: Device, precision and time; None takes the defaults.
        out: JSON file, written anew after every row, so that an interruption leaves
            what was measured; its "complete" is then false.
        say: Gets a line for each row.

    Returns:
        The record: `data` is what the file holds, `failures` what failed its check and
        hence was not timed, or broke.

    Raises:
        ConfigError: The name or an option is unknown.
        BackendUnavailableError: The device isn't there.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            describe(
                "unknown benchmark", expected=", ".join(BENCHMARKS), found=repr(name)
            )
        )
    what, benchmark = BENCHMARKS[name]
    path = None if out is None else Path(out)
    record = Record(what, settings or BenchmarkSettings(), path, say)
    with fixed_arithmetic(), _on(record.device):
        benchmark(record)
    record.finish()
    return record


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one, on whose clock and stream calls are timed."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()
