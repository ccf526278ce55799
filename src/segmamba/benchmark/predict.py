"""One BraTS case from four files to a label map, and where the time goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from segmamba.benchmark.model import build, check_network
from segmamba.benchmark.peers import CHANNELS
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.timing import allocated, summary, synchronize
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.data.preprocess import preprocess_image, restore_label_map
from segmamba.errors import FormatError, SegMambaError, describe
from segmamba.inference import Prediction, Predictor, find_cases, predict_cases
from segmamba.inference.cases import peak_memory_mib
from segmamba.inference.sliding_window import num_windows, sliding_window_logits
from segmamba.io import Volume, read_case, write_volume
from segmamba.types import Size3

T = TypeVar("T")

CHANNEL_NAMES = ("t1n", "t1c", "t2w", "t2f")
SCHEME = LabelScheme(
    {"background": 0, "necrotic core": 1, "oedema": 2, "enhancing tumour": 3}
)
SHAPE: Size3 = (240, 240, 155)
QUICK_SHAPE: Size3 = (26, 24, 20)
"""Voxels of the simulated scan along I, J, K, 1 mm each."""

BRAIN = (0.31, 0.38, 0.45)
"""Half axes of the simulated brain as shares of the scan's sides."""

PATCH, QUICK_PATCH = 128, 16
ROUNDS = 3

SAME_SHARE = 1e-2
"""Share of voxels that may differ between two predictions: random weights hardly tell
one class from another, and cuDNN may change its algorithm."""


def benchmark_predict(record: Record) -> None:
    """Predict a case end to end, with overlap 0.5 and all eight mirrorings.

    The weights are random, which costs the same. After one cold prediction, which
    compiles and searches for algorithms, three are timed by the clock. Then the same
    steps are taken one by one and timed each; their label map must be the same.

    Args:
        record: Where the rows go: the whole, its parts, and the peaks of memory.
    """
    settings = record.settings
    if not check_network(record):
        return
    with tempfile.TemporaryDirectory(prefix="segmamba-benchmark-") as folder:
        files = _case_files(settings, Path(folder) / "case")
        predictor = _predictor(settings)
        allocated(record.device)  # free what the check held
        if record.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(record.device)
        rounds = range(ROUNDS + 1)
        times = [_end_to_end(predictor, files, Path(folder)) for _ in rounds]
        steps = _Steps(predictor, files, Path(folder) / "parts.nii.gz")
        if not record.check(
            "prediction", lambda: _difference(steps, folder), SAME_SHARE
        ):
            return
        _keep(record, steps, times)


def _keep(record: Record, steps: _Steps, times: list[float]) -> None:
    memory = {
        "peak_mib": _gpu_peak_mib(record.device),
        "peak_cpu_mib": peak_memory_mib(torch.device("cpu")),
    }
    case = "x".join(map(str, steps.shape))
    record.add(
        OURS,
        case,
        "end to end",
        **summary(times[1:]),
        cold_ms=times[0],
        shape=[CHANNELS, *steps.shape],
        windows=steps.windows,
        **memory,
    )
    for name, milliseconds in steps.taken.items():
        record.add(OURS, case, name, **summary([milliseconds]))


def _end_to_end(predictor: Predictor, files: tuple[Path, ...], folder: Path) -> float:
    """Milliseconds of `predict_cases` on four files, as the command line calls it."""
    begin = time.perf_counter()
    result = predict_cases(predictor, files, folder / "whole.nii.gz", overwrite=True)
    for problem in result.failed.values():
        raise SegMambaError(problem)
    return 1000 * (time.perf_counter() - begin)


class _Steps:
    """The steps of a prediction by themselves, each timed once."""

    def __init__(
        self, predictor: Predictor, files: tuple[Path, ...], out: Path
    ) -> None:
        self.taken: dict[str, float] = {}
        self.device = predictor.device
        plan = predictor.plan
        volume = self._time("read", lambda: read_case(files))
        image, geometry = self._time(
            "preprocess", lambda: preprocess_image(volume, plan)
        )
        logits = self._time(
            "network",
            lambda: sliding_window_logits(
                predictor.networks,
                torch.from_numpy(image),
                plan.patch_size,
                overlap=predictor.overlap,
                mirror_axes=predictor.mirror_axes,
                device=predictor.device,
                precision=predictor.precision,
            ),
        )
        self.label_map = self._time(
            "restore", lambda: restore_label_map(logits, geometry, SCHEME)
        )
        prediction = Prediction(self.label_map, volume.affine, source=volume.path)
        self._time("write", lambda: prediction.save(out))
        self.shape = volume.shape
        self.windows = num_windows(geometry.shape, plan.patch_size, predictor.overlap)

    def _time(self, name: str, step: Callable[[], T]) -> T:
        synchronize(self.device)
        begin = time.perf_counter()
        result = step()
        synchronize(self.device)
        self.taken[name] = 1000 * (time.perf_counter() - begin)
        return result


def _difference(steps: _Steps, folder: str) -> dict[str, float]:
    """Share of voxels in which the files of the whole and of its parts differ."""
    paths = [Path(folder) / f"{name}.nii.gz" for name in ("whole", "parts")]
    whole, parts = (read_case([path]).array for path in paths)
    if whole.shape != parts.shape:
        return {"differing voxels": float("inf")}
    empty = 0.0 if parts.any() else 1.0
    return {"differing voxels": float((whole != parts).mean()), "empty": empty}


def _predictor(settings: BenchmarkSettings) -> Predictor:
    side = QUICK_PATCH if settings.quick else PATCH
    network = build(settings)
    config: Any = network.config
    plan = Plan(
        orientation="SPL",
        spacing_mm=(1.0, 1.0, 1.0),
        patch_size=(side, side, side),
        batch_size=2,
        normalization=(ChannelNormalization("zscore-nonzero"),) * CHANNELS,
        network=config,
    )
    return Predictor(
        network,
        plan,
        CHANNEL_NAMES,
        SCHEME,
        device=settings.place,
        precision=settings.precision,
    )


def _case_files(settings: BenchmarkSettings, folder: Path) -> tuple[Path, ...]:
    """The given case's four files, or those of a simulated one."""
    if settings.case is None:
        return _simulate(folder, QUICK_SHAPE if settings.quick else SHAPE)
    case = find_cases(settings.case, CHANNEL_NAMES)[0]
    if case.problem is not None or len(case.images) != CHANNELS:
        raise FormatError(
            describe(
                "not a case with four scans",
                expected="one file for each of " + ", ".join(CHANNEL_NAMES),
                found=case.problem or f"{len(case.images)} files",
                file=settings.case,
            )
        )
    return case.images


def _simulate(folder: Path, shape: Size3) -> tuple[Path, ...]:
    """Write four noisy ellipsoids on zeros, as large as a brain, as int16."""
    random = np.random.default_rng(0)
    grid = np.meshgrid(*[np.linspace(-0.5, 0.5, n) for n in shape], indexing="ij")
    brain = sum((x / half) ** 2 for x, half in zip(grid, BRAIN, strict=True)) < 1
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    files = []
    for name in CHANNEL_NAMES:
        image = random.normal(500, 80, shape) * brain
        files.append(folder / f"case-{name}.nii.gz")
        write_volume(files[-1], Volume(image.astype(np.int16)[None], affine))
    return tuple(files)


def _gpu_peak_mib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
