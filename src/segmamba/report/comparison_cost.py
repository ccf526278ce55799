"""What a model costs, as far as its folder says."""

from __future__ import annotations

import json
import statistics
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path

from segmamba.training.logger import read_log
from segmamba.types import JsonDict

MODEL_FILE = "model.safetensors"
LOG_FILE = "log.jsonl"
MANIFEST_FILE = "manifest.json"


def model_cost(files: Sequence[Path]) -> JsonDict:
    """Read a model's cost from the folders beside its scores.

    Args:
        files: Its `metrics.json`, one a fold or one of a whole run.

    Returns:
        "parameters" (of the first fold with weights), "ms_per_step" (median over the
        folds' epochs, the first epoch apart, validation not counted),
        "peak_memory_mib" (largest in the logs), "steps" and "training_s" (all folds
        together) and "device" (GPU or processor that trained); None for what isn't
        there.
    """
    folders = [folder for file in files for folder in _training_folders(file)]
    logs = [read_log(folder / LOG_FILE) for folder in folders]
    times = [time for log in logs for time in step_times_ms(log)]
    peaks = [line.get("peak_memory_mib") for log in logs for line in log]
    known = [peak for peak in peaks if isinstance(peak, (int, float))]
    spent = [log[-1].get("elapsed_s") for log in logs if log]
    whole = [s for s in spent if isinstance(s, (int, float))]
    steps = [log[-1].get("step") for log in logs if log]
    known_steps = [n for n in steps if isinstance(n, int)]
    counts = (count_parameters(folder / MODEL_FILE) for folder in folders)
    devices = (_device(folder / MANIFEST_FILE) for folder in folders)
    return {
        "parameters": next((count for count in counts if count is not None), None),
        "ms_per_step": statistics.median(times) if times else None,
        "peak_memory_mib": max(known) if known else None,
        "steps": sum(known_steps) if len(known_steps) == len(folders) else None,
        "training_s": sum(whole) if len(whole) == len(folders) else None,
        "device": next((name for name in devices if name is not None), None),
    }


def _training_folders(file: Path) -> list[Path]:
    """Folders with the logs of what was scored: the file's own, or a run's folds."""
    folds = sorted(log.parent for log in file.parent.glob(f"fold_*/{LOG_FILE}"))
    numbered = [fold for fold in folds if fold.name != "fold_all"]
    if (file.parent / LOG_FILE).exists():
        return [file.parent]
    return numbered or folds or [file.parent]


def _device(file: Path) -> str | None:
    """Read where a training ran; None if its manifest doesn't say."""
    try:
        machine = json.loads(file.read_text(encoding="utf-8"))["machine"]
        name = machine["gpu"] or machine["processor"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def step_times_ms(log: Sequence[JsonDict]) -> list[float]:
    """Give the mean time of a step, epoch by epoch.

    Args:
        log: Lines of a `log.jsonl`.

    Returns:
        Milliseconds, without the first epoch (compiling, waking up) if there are more.
    """
    times, before = [], 0
    for line in log:
        steps, seconds = line.get("step", 0) - before, line.get("seconds")
        before = line.get("step", 0)
        if steps > 0 and isinstance(seconds, (int, float)):
            times.append(1000 * seconds / steps)
    return times[1:] if len(times) > 1 else times


def count_parameters(file: Path) -> int | None:
    """Count the numbers in a safetensors file by its header, without reading them.

    Args:
        file: The file.

    Returns:
        Their number; None if the file isn't there or isn't such a file.

    Source:
        The format: eight bytes of length, then that much JSON.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 2**26)))
        shapes = [v["shape"] for k, v in header.items() if k != "__metadata__"]
        return sum(prod(shape) for shape in shapes)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return None
