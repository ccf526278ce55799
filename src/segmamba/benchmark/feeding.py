"""Whether a training's batches come as fast as a GPU uses them up."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from segmamba.benchmark.checks import relative_error
from segmamba.benchmark.model import build
from segmamba.benchmark.peers import CHANNELS
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.simulated import (
    QUICK_SHAPE,
    SCHEME,
    SHAPE,
    simulate_dataset,
)
from segmamba.benchmark.timing import allocated, summary
from segmamba.config import AugmentationConfig, TrainConfig
from segmamba.data.augment import Batch
from segmamba.data.cache import Cache, build_cache
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.data.sampler import PatchSampler
from segmamba.errors import SegMambaError
from segmamba.training.batches import batch_maker, to_device
from segmamba.training.feed import Feed, default_workers
from segmamba.training.logger import read_log
from segmamba.training.losses import build_loss
from segmamba.training.trainer import Trainer
from segmamba.types import JsonDict, Size3

CASES, QUICK_CASES = 8, 2
BATCH = 2
SIDE, QUICK_SIDE = 128, 16

EPOCH, QUICK_EPOCH = 20, 3
"""Steps of an epoch. The first epoch warms up; in the last one's second half, when
what was prepared ahead is used up, a profiler looks on."""

AUGMENTATIONS = {
    "without augmentation": AugmentationConfig(enabled=False),
    "with augmentation": AugmentationConfig(),
}

LIMITS = {"image": 1e-3, "differing labels": 1e-3}
"""Between a GPU's augmented batches and the CPU's: they interpolate and sum apart."""

MakeBatch = Callable[[int], Batch]


def benchmark_feeding(record: Record) -> None:
    """Train preset segmamba on cases as large as BraTS's, in three ways.

    On one batch that stays on the device, without augmentation, and with it; by the
    trainer itself, with as many threads as it takes by default. Figures are the
    trainer's log's, of all epochs but the first, for so many seconds. In one more epoch
    a profiler tells which share of the time at least one kernel ran; it slows the CPU,
    so the true share is no lower. On a CPU there is no such share.

    Args:
        record: Where the rows go.
    """
    with tempfile.TemporaryDirectory(prefix="segmamba-benchmark-") as name:
        data = _Data.make(record.settings, Path(name))
        if not record.check("batches", data.errors, LIMITS):
            return
        alone = data.maker(AUGMENTATIONS["without augmentation"])(0)
        alone = to_device(alone, record.device)
        _train(record, data, "batch that stays on the device", lambda _: alone)
        for mode, augmentation in AUGMENTATIONS.items():
            _train(record, data, mode, data.maker(augmentation))
    _compare(record)


@dataclasses.dataclass(frozen=True)
class _Data:
    """Simulated cases, preprocessed."""

    settings: BenchmarkSettings
    folder: Path
    plan: Plan
    cache: Cache

    @classmethod
    def make(cls, settings: BenchmarkSettings, folder: Path) -> _Data:
        shape, cases = SHAPE, CASES
        if settings.quick:
            shape, cases = QUICK_SHAPE, QUICK_CASES
        dataset = simulate_dataset(folder / "data", shape, cases)
        plan = _plan(settings)
        return cls(settings, folder, plan, build_cache(dataset, plan, folder / "cache"))

    def maker(
        self, augmentation: AugmentationConfig, device: torch.device | None = None
    ) -> MakeBatch:
        """Give what makes the batch of a step, on a device."""
        sampler = PatchSampler(
            self.cache,
            self.cache.case_ids,
            self.plan.patch_size,
            BATCH,
            SCHEME,
            margin=augmentation,
        )
        place = device or self.settings.place
        return batch_maker(sampler, augmentation, seed=0, device=place)

    def errors(self) -> dict[str, float]:
        """Compare the batches that threads make on the device with the CPU's own."""
        # Noise is each device's own, and small changes grow in what follows a rotation.
        augmentation = AugmentationConfig(p_noise=0.0, p_rotation=1.0)
        plain = self.maker(augmentation, torch.device("cpu"))
        errors = {"image": 0.0, "differing labels": 0.0}
        make = self.maker(augmentation)
        with Feed(make, self.settings.place, workers=2) as feed:
            for step in range(2):
                found, expected = feed.next(), plain(step)
                image = relative_error(found.image, expected.image)
                labels = (found.label.cpu() != expected.label).float().mean()
                errors["image"] = max(errors["image"], image)
                errors["differing labels"] = max(
                    errors["differing labels"], float(labels)
                )
        return errors


def _plan(settings: BenchmarkSettings) -> Plan:
    side = QUICK_SIDE if settings.quick else SIDE
    patch: Size3 = (side, side, side)
    network: Any = build(settings).config
    rules = (ChannelNormalization("zscore-nonzero"),) * CHANNELS
    return Plan("SPL", (1.0, 1.0, 1.0), patch, BATCH, rules, network)


def _train(record: Record, data: _Data, mode: str, make_batch: MakeBatch) -> None:
    """Train for the benchmark's time and keep a row."""
    settings, patch = record.settings, data.plan.patch_size
    place = (OURS, f"{BATCH}x{CHANNELS}x{patch[0]}^3", mode)
    epoch = QUICK_EPOCH if settings.quick else EPOCH
    watch = _Watch(settings.seconds, record.device, allocated(record.device), epoch)
    trainer = Trainer(
        build(settings).train(),
        make_batch,
        build_loss("dice_ce", SCHEME),
        TrainConfig(
            max_epochs=10**6,
            iterations_per_epoch=epoch,
            precision=settings.precision,
            save_every_s=1e9,
        ),
        data.folder / mode,
        device=settings.place,
        on_progress=watch.note_step,
        on_epoch=watch.note_epoch,
        tensorboard=False,
    )
    try:
        trainer.fit()
    except _EnoughError:
        shape = [BATCH, CHANNELS, *patch]
        record.add(*place, shape=shape, workers=_workers(trainer), **watch.figures())
    except SegMambaError as error:  # the other ways must not suffer from it
        record.add(*place, status="failed", note=str(error))


def _workers(trainer: Trainer) -> int:
    wanted = trainer.config.workers
    return default_workers(trainer.device) if wanted is None else wanted


class _EnoughError(Exception):
    """Ends a training between two epochs; no state is saved."""


class _Watch:
    """Takes the time of steps and the log's lines, and ends the training."""

    def __init__(
        self, seconds: float, device: torch.device, baseline: int, epoch: int
    ) -> None:
        self._seconds, self._device = seconds, device
        self._baseline, self._epoch = baseline, epoch
        self._times: list[float] = []
        self._lines: list[JsonDict] = []
        self._peaks: list[float] = []
        self._last: float | None = None
        self._steps = 0  # of the present epoch
        self._profile: profile | None = None  # of the last epoch's second half
        self._busy: float | None = None

    def note_step(self, _: object) -> None:
        """Note that a step is over."""
        now = time.perf_counter()
        if self._last is not None and self._profile is None:
            self._times.append(1000 * (now - self._last))
        self._last, self._steps = now, self._steps + 1
        if self._profile is not None and self._steps == self._epoch // 2:
            self._profile.start()

    def note_epoch(self, log: Path) -> None:
        """Note that an epoch is over; raise if it was the last one."""
        line = read_log(log)[-1]
        # The first epoch's too: what a graph holds is counted while it is recorded.
        self._peaks.append(line["peak_memory_mib"] or 0.0)
        self._last, self._steps = None, 0  # what comes between epochs is no step
        if line["epoch"] == 1:  # compiled, and searched for algorithms
            self._times.clear()
            if self._device.type == "cuda":
                with _profiler():  # its first start takes seconds
                    pass
            return
        if self._profile is not None:
            self._profile.stop()
            self._busy = busy_share(kernel_intervals(self._profile))
            raise _EnoughError
        self._lines.append(line)
        if sum(line["seconds"] for line in self._lines) >= self._seconds:
            if self._device.type != "cuda":
                raise _EnoughError
            self._profile = _profiler()

    def figures(self) -> JsonDict:
        """Give the row's figures."""
        lines = self._lines
        seconds = sum(line["seconds"] for line in lines)
        patches = sum(line["patches_per_s"] * line["seconds"] for line in lines)
        return {
            **summary(self._times),
            "patches_per_s": patches / seconds,
            "waiting_share": sum(line["waited_s"] for line in lines) / seconds,
            "gpu_busy_share": self._busy,
            "steps": lines[-1]["step"],
            "loss": lines[-1]["loss"],
            **self._memory(),
        }

    def _memory(self) -> JsonDict:
        if self._device.type != "cuda":
            return {"peak_mib": None}
        peak = max(self._peaks) - self._baseline / 2**20
        held = torch.cuda.max_memory_reserved(self._device) / 2**20
        return {"peak_mib": round(peak, 1), "peak_reserved_mib": round(held, 1)}


def _profiler() -> profile:
    return profile(activities=[ProfilerActivity.CUDA])


def kernel_intervals(profiled: profile) -> list[tuple[float, float]]:
    """Give start and end of every kernel that a profiler saw, copies left out."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or []
        if event.device_type.name == "CUDA"
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def busy_share(intervals: Iterable[tuple[float, float]]) -> float | None:
    """Give the share of the time, first start to last end, that any interval covers.

    Args:
        intervals: Start and end of each, in any order; they may overlap.

    Returns:
        0 to 1; None without intervals.
    """
    busy, begin, reached = 0.0, None, 0.0
    for start, end in sorted(intervals):
        if begin is None:
            begin = reached = start
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return None if begin is None else busy / (reached - begin)


def _compare(record: Record) -> None:
    """Add to each row its patches/s over those with the batch that stays."""
    rows = record.data["measurements"]
    base = rows[0].get("patches_per_s")
    for row in rows:
        if base and "patches_per_s" in row:
            row["share_of_staying_batch"] = row["patches_per_s"] / base
