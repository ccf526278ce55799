"""One fold: from preprocessed cases to weights and scores on held-out cases."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from segmamba.atomic import read_json, write_text
from segmamba.checkpoint import load_model_file
from segmamba.config import AnyNetworkConfig, TrainConfig, from_dict, load_yaml
from segmamba.data.cache import Cache, build_cache
from segmamba.data.dataset import Dataset
from segmamba.data.memory import device_memory_mib
from segmamba.data.plan import Plan, plan_hash
from segmamba.data.sampler import PatchSampler
from segmamba.data.splits import Split
from segmamba.errors import TrainingError
from segmamba.manifest import NAME, Session
from segmamba.nn import build_network
from segmamba.report.figures import training_curve
from segmamba.training.batches import batch_maker
from segmamba.training.fold_folder import FoldFolder
from segmamba.training.losses import build_loss
from segmamba.training.results import Progress as TrainingProgress
from segmamba.training.results import TrainResult
from segmamba.training.trainer import Trainer
from segmamba.types import JsonDict
from segmamba.workflow.folder import Progress, RunFolder, staged
from segmamba.workflow.memory_hint import Step, memory_hint
from segmamba.workflow.snapshots import snapshot_keeper
from segmamba.workflow.training_record import (
    SETTINGS,
    TrainingRecord,
    settings_again,
    split_hash,
    training_facts,
)
from segmamba.workflow.validation import final_validation, quick_validation

SCORES = "metrics.json"
"""A fold's scores on the cases that it holds out."""

CURVE_EVERY_S = 20.0
"""Seconds between pictures of the log: a picture takes up to half a second."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training left."""

    folder: Path
    """The fold's folder."""
    seconds: float
    """Time of training, all resumed parts together, validation apart."""
    metrics: JsonDict | None
    """Scores on the held-out cases; None where every case trained."""


@dataclass(frozen=True)
class FoldTraining:
    """All that decides the training of one fold."""

    dataset: Dataset
    """The data set."""
    plan: Plan
    """The run's plan."""
    config: TrainConfig
    """How to train."""
    members: Split
    """Which cases train ("train") and which are held out ("val")."""
    run: RunFolder
    """The run."""
    fold: str
    """A number, or "all"."""
    device: torch.device
    """Where to train and to validate."""
    progress: Progress | None = None
    """Called with steps done, all steps, what is being done, and a note."""

    def train(self, resume: bool, say: Callable[[str], None]) -> TrainingOutcome:
        """Preprocess what is missing, train, and score the held-out cases.

        Args:
            resume: Go on from the last saved state.
            say: Called with a line of text at each stage.

        Returns:
            Folder, time and scores.

        Raises:
            ConfigError: The fold holds a training, and `resume` is off.
        """
        if not resume:  # before work that takes long for large data
            FoldFolder(self.run.fold(self.fold)).refuse_to_overwrite()
        with Session("train") as session:
            shown = staged(self.progress, "preprocessing")
            cache = build_cache(self.dataset, self.plan, self.run.cache, progress=shown)
            trainer = self._trainer(cache)
            record = self._recorded(trainer, session)
            say(
                f"Training {self.plan.network.name} on "
                f"{len(self.members['train'])} cases, {self.device.type} "
                f"{trainer.precision}, patch {self.plan.patch_size}, into "
                f"{trainer.folder.path}"
            )
            result = _fit(trainer, record, resume)
            # Scores of earlier weights would pass for these ones' if validation fails.
            (trainer.folder.path / SCORES).unlink(missing_ok=True)
            if result.log_path.exists():
                _draw_curve(result.log_path)
            if result.note:
                say(result.note)
            scores = self._scores()
            record.write("finished", scores)
        return TrainingOutcome(trainer.folder.path, result.elapsed_s, scores)

    def is_finished(self) -> bool:
        """Tell whether just this training is over and its held-out cases are scored.

        Raises:
            FormatError: One of the fold's files is broken.
            CheckpointError: Its model is.
        """
        folder = self.run.fold(self.fold)
        names = ("model.safetensors", "config.yaml", SCORES)
        model, config, metrics = (folder / name for name in names)
        if not all(path.is_file() for path in (model, config, metrics)):
            return False
        trained = load_model_file(model)
        expected = {
            "finished": True,
            "plan_hash": plan_hash(self.plan),
            "split_hash": split_hash(self.members),
        }
        found = {key: trained.metadata.get(key) for key in expected}
        if found != expected or trained.network != self.network_config:
            return False
        if from_dict(TrainConfig, load_yaml(config), source=str(config)) != self.config:
            return False
        return set(read_json(metrics)["cases"]) == set(self.members["val"])

    @property
    def network_config(self) -> AnyNetworkConfig:
        """The network that is trained: the plan's, supervised as the settings say."""
        supervised = self.plan.network.deep_supervision or self.config.deep_supervision
        return dataclasses.replace(self.plan.network, deep_supervision=supervised)

    def _scores(self) -> JsonDict | None:
        if not self.members["val"]:
            return None
        return final_validation(
            self.dataset,
            self.members["val"],
            self.run,
            self.fold,
            device=self.device,
            precision=self.config.precision,
            progress=self.progress,
        )

    def _trainer(self, cache: Cache) -> Trainer:
        folder, seed = self.run.fold(self.fold), self.config.seed
        torch.manual_seed(seed)  # the weights' own randomness
        return Trainer(
            build_network(self.network_config),
            batch_maker(
                self._sampler(cache),
                self.config.augmentation,
                seed=seed,
                device=self.device,
            ),
            build_loss(self.config.loss, self.dataset.labels),
            self.config,
            folder,
            plan_hash=plan_hash(self.plan),
            split_hash=split_hash(self.members),
            device=self.device,
            validate=self._validation(cache),
            model_metadata={
                "dataset": self.dataset.name,
                "preset": self.plan.network.name,
            },
            memory_hint=self._memory_hint(),
        )

    def _recorded(self, trainer: Trainer, session: Session) -> TrainingRecord:
        """Let a training write its manifest, curve and snapshots as it goes."""
        folder = trainer.folder.path
        record = TrainingRecord(folder / NAME, session, training_facts(self), trainer)
        keep = snapshot_keeper(trainer, self.config.snapshots)
        show = self.progress and _display(self.progress)
        drawn = -math.inf
        settings = settings_again(self.plan, self.config)

        def on_progress(state: TrainingProgress) -> None:
            record.note_step(state.step)
            if show is not None:
                show(state)

        def on_epoch(log: Path) -> None:
            nonlocal drawn
            keep(log)
            if time.monotonic() - drawn >= CURVE_EVERY_S:
                _draw_curve(log)
                drawn = time.monotonic()
            write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False))
            record.write()

        trainer.on_progress, trainer.on_epoch = on_progress, on_epoch
        return record

    def _sampler(self, cache: Cache) -> PatchSampler:
        return PatchSampler(
            cache,
            self.members["train"],
            self.plan.patch_size,
            self._batch_size,
            self.dataset.labels,
            oversample_foreground=self.config.oversample_foreground,
            seed=self.config.seed,
            margin=self.config.augmentation,
        )

    def _validation(self, cache: Cache) -> Callable[[nn.Module], JsonDict] | None:
        if not self.members["val"]:
            return None
        return quick_validation(
            cache,
            self.members["val"],
            self.dataset.labels,
            self.plan.patch_size,
            device=self.device,
            precision=self.config.precision,
        )

    @property
    def _batch_size(self) -> int:
        return self.config.batch_size or self.plan.batch_size

    def _memory_hint(self) -> str:
        """Say what a step should take, and which number to change to which."""
        kind, patch = self.device.type, self.plan.patch_size
        step = Step(self.network_config, patch, self._batch_size, kind)
        is_set = self._batch_size != self.plan.batch_size
        return memory_hint(
            step,
            device_memory_mib(str(self.device)),
            self.run.plan,
            "the settings' section train" if is_set else "",
        )


def _fit(trainer: Trainer, record: TrainingRecord, resume: bool) -> TrainResult:
    """Train; if that stops early, let the manifest say why."""
    try:
        return trainer.fit(resume=resume)
    except TrainingError as error:
        with contextlib.suppress(OSError):  # the disk may be full
            record.write(f"stopped: {error}")
        raise


def _draw_curve(log: Path) -> None:
    training_curve(log, log.with_name("curve.png"))


def _display(progress: Progress) -> Callable[[TrainingProgress], None]:
    """Show a training's progress in thousandths, with loss and rate."""

    def show(state: TrainingProgress) -> None:
        note = (
            f"epoch {state.epoch}, step {state.step}, loss {state.loss:.4f}, "
            f"{state.patches_per_s:.1f} patches/s"
        )
        done = int(1000 * state.fraction)  # 1000 at the end alone, which has its line
        progress(done, 1000, "training, thousandths", note)

    return show
