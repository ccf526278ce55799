"""One BraTS case from four files to a label map, and where the time goes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from segmamba.atomic import read_json, write_json
from segmamba.benchmark.checks import NETWORK_LIMITS, relative_error
from segmamba.benchmark.environment import fixed_arithmetic
from segmamba.benchmark.model import build, check_network
from segmamba.benchmark.peers import CHANNELS, OUTPUTS
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.simulated import (
    CHANNEL_NAMES,
    QUICK_SHAPE,
    SCHEME,
    SHAPE,
    simulate_scans,
)
from segmamba.benchmark.timing import allocated, summary, synchronize
from segmamba.checkpoint import save_model
from segmamba.data.dataset import Dataset, dataset_to_dict
from segmamba.data.plan import ChannelNormalization, Plan, plan_hash, save_plan
from segmamba.data.preprocess import preprocess_image, restore_label_map
from segmamba.devices import peak_memory_mib
from segmamba.errors import FormatError, SegMambaError, describe
from segmamba.inference import Prediction, Predictor, find_cases, predict_cases
from segmamba.inference.replay import Replays
from segmamba.inference.sliding_window import num_windows, sliding_window_logits
from segmamba.io import read_case
from segmamba.types import JsonDict

T = TypeVar("T")

PATCH, QUICK_PATCH = 128, 16
ROUNDS = 3

SAME_SHARE = 1e-2
"""Share of voxels that may differ between two predictions: random weights hardly tell
one class from another, and cuDNN may change its algorithm."""


def benchmark_predict(record: Record) -> None:
    """Predict a case end to end, with overlap 0.5 and all eight mirrorings.

    The weights are random, which costs the same. cuDNN doesn't search for algorithms,
    as it doesn't when users predict. After one cold prediction, which compiles, three
    are timed by the clock. Then the same steps are taken one by one, three times; their
    label map must be the same. At last the command itself is timed, from its start.

    Args:
        record: Where the rows go: the whole, its parts, and the peaks of memory.
    """
    if not check_network(record):
        return
    with (
        fixed_arithmetic(search=False),
        tempfile.TemporaryDirectory(prefix="segmamba-benchmark-") as name,
    ):
        folder = Path(name)
        files = _case_files(record.settings, folder / "case")
        predictor = _predictor(record.settings)
        allocated(record.device)  # free what the check held
        if record.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(record.device)
        times = [_end_to_end(predictor, files, folder) for _ in range(ROUNDS + 1)]
        memory = _gpu_peaks(record.device)
        steps = _Steps(predictor, files, folder / "parts.nii.gz")
        if not record.check(
            "prediction", lambda: _difference(folder, "whole", "parts"), SAME_SHARE
        ):
            return
        _keep(record, steps, times, memory)
        if record.device.type == "cuda":
            _keep_without_graph(record, steps)
        if not record.settings.quick:
            _keep_command(record, steps.case, predictor, files, folder)


def _keep(record: Record, steps: _Steps, times: list[float], memory: JsonDict) -> None:
    record.add(
        OURS,
        steps.case,
        "end to end",
        **summary(times[1:]),
        cold_ms=times[0],
        shape=[CHANNELS, *steps.shape],
        preprocessed_shape=list(steps.image.shape),
        windows=steps.windows,
        passes=steps.windows * 2 ** len(steps.predictor.mirror_axes),
        **memory,
    )
    for name, milliseconds in steps.taken.items():
        record.add(OURS, steps.case, name, **summary(milliseconds))


def _keep_without_graph(record: Record, steps: _Steps) -> None:
    """Time the windows as they would run without a graph, if both give the same."""
    network = steps.predictor.networks[0]

    def difference() -> dict[str, float]:
        plain = steps.logits(network)
        return {"logits": relative_error(steps.logits(steps.launcher), plain)}

    limit = NETWORK_LIMITS[record.settings.precision]
    if not record.check("windows replayed as a graph", difference, limit):
        return
    times = [steps.time(lambda: steps.logits(network))[1] for _ in range(ROUNDS)]
    replayed = getattr(steps.launcher, "has_record", False)
    facts = {"others_are_replayed": replayed}
    record.add(OURS, steps.case, "windows, launched singly", **facts, **summary(times))


def _keep_command(
    record: Record,
    case: str,
    predictor: Predictor,
    files: tuple[Path, ...],
    folder: Path,
) -> None:
    """Time `segmamba predict` in a process of its own, its kernels compiled before."""
    _write_run(predictor, folder / "run")
    words = [sys.executable, "-m", "segmamba", "predict", str(folder / "run")]
    words += [*map(str, files), "-o", str(folder / "command.nii.gz"), "--overwrite"]
    words += ["--device", str(predictor.device), "--precision", predictor.precision]

    def run() -> float:
        begin = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SegMambaError(done.stderr.strip() or f"exit code {done.returncode}")
        return 1000 * (time.perf_counter() - begin)

    times: list[float] = []

    def difference() -> dict[str, float]:
        times.extend(run() for _ in range(ROUNDS))
        return _difference(folder, "whole", "command")

    if record.check("whole command", difference, SAME_SHARE):
        memory = read_json(folder / "command_manifest.json")["peak_memory_mib"]
        facts = {"peak_cpu_mib": memory["process"]}
        record.add(OURS, case, "whole command", **summary(times), **facts)


def _end_to_end(predictor: Predictor, files: tuple[Path, ...], folder: Path) -> float:
    """Milliseconds of `predict_cases` on four files, as the command line calls it."""
    begin = time.perf_counter()
    result = predict_cases(predictor, files, folder / "whole.nii.gz", overwrite=True)
    for problem in result.failed.values():
        raise SegMambaError(problem)
    return 1000 * (time.perf_counter() - begin)


class _Steps:
    """The steps of a prediction by themselves, each timed so many rounds."""

    def __init__(
        self, predictor: Predictor, files: tuple[Path, ...], out: Path
    ) -> None:
        self.taken: dict[str, list[float]] = defaultdict(list)
        self.predictor = predictor
        self.launcher = Replays().launcher(predictor.networks[0], predictor.device)
        for _ in range(ROUNDS):
            self._take(files, out)

    def _take(self, files: tuple[Path, ...], out: Path) -> None:
        plan = self.predictor.plan
        volume = self._step("read", lambda: read_case(files))
        array, geometry = self._step(
            "preprocess", lambda: preprocess_image(volume, plan)
        )
        image = torch.from_numpy(array)
        self.image = self._step("copy", lambda: image.to(self.predictor.device))
        self.shape, self.case = volume.shape, "x".join(map(str, volume.shape))
        self.windows = num_windows(
            geometry.shape, plan.patch_size, self.predictor.overlap
        )
        logits = self._step("windows", lambda: self.logits(self.launcher))
        self._step("windows, network left out", lambda: self.logits(_Nothing()))
        label_map = self._step(
            "restore", lambda: restore_label_map(logits, geometry, SCHEME)
        )
        prediction = Prediction(label_map, volume.affine, source=volume.path)
        self._step("write", lambda: prediction.save(out))

    def logits(self, network: Callable[..., Any]) -> Tensor:
        """Run a network over the windows as the predictor does."""
        return sliding_window_logits(
            network,
            self.image,
            self.predictor.plan.patch_size,
            overlap=self.predictor.overlap,
            mirror_axes=self.predictor.mirror_axes,
            device=self.predictor.device,
            precision=self.predictor.precision,
        )

    def time(self, step: Callable[[], T]) -> tuple[T, float]:
        """Give a step's result and its milliseconds."""
        synchronize(self.predictor.device)
        begin = time.perf_counter()
        result = step()
        synchronize(self.predictor.device)
        return result, 1000 * (time.perf_counter() - begin)

    def _step(self, name: str, step: Callable[[], T]) -> T:
        result, milliseconds = self.time(step)
        self.taken[name].append(milliseconds)
        return result


class _Nothing:
    """A network that costs nothing: what is left is mirroring, weights and sums."""

    logits: Tensor | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        if self.logits is None:
            kind = batch.device.type
            half = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if half else batch.dtype
            shape = (len(batch), OUTPUTS, *batch.shape[2:])
            self.logits = torch.zeros(shape, dtype=dtype, device=batch.device)
        return self.logits


def _difference(folder: Path, *names: str) -> dict[str, float]:
    """Share of voxels in which two label maps differ."""
    one, other = (read_case([folder / f"{name}.nii.gz"]).array for name in names)
    if one.shape != other.shape:
        return {"differing voxels": float("inf")}
    empty = 0.0 if other.any() else 1.0
    return {"differing voxels": float((one != other).mean()), "empty": empty}


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


def _write_run(predictor: Predictor, folder: Path) -> None:
    """Write what training would have left."""
    plan, network = predictor.plan, predictor.networks[0]
    assert isinstance(network, torch.nn.Module)
    dataset = Dataset("simulated", folder, "brats", CHANNEL_NAMES, SCHEME, ())
    save_plan(folder / "plan.json", plan)
    write_json(folder / "dataset.json", dataset_to_dict(dataset))
    save_model(
        folder / "fold_0" / "model.safetensors",
        network.state_dict(),
        network=plan.network,
        metadata={"plan_hash": plan_hash(plan), "finished": True},
    )


def _case_files(settings: BenchmarkSettings, folder: Path) -> tuple[Path, ...]:
    """The given case's four files, or those of a simulated one."""
    if settings.case is None:
        return simulate_scans(folder, QUICK_SHAPE if settings.quick else SHAPE)
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


def _gpu_peaks(device: torch.device) -> JsonDict:
    """Most GPU memory in MiB that tensors took, and that was held for them."""
    if device.type != "cuda":
        return {"peak_mib": None}
    held = torch.cuda.max_memory_reserved(device) / 2**20
    return {"peak_mib": peak_memory_mib(device), "peak_reserved_mib": round(held, 1)}
