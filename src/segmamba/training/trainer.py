"""Training, in the order in which it happens: set up, fit, step, validate, save."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmamba.config import TrainConfig
from segmamba.data.augment import Batch
from segmamba.devices import (
    Precision,
    autocast,
    peak_memory_mib,
    precision_for,
    resolve_device,
)
from segmamba.errors import TrainingError
from segmamba.lock import folder_lock
from segmamba.ops.backends import warn_if_slow
from segmamba.training.diagnosis import explain_interruption, explained, is_finite
from segmamba.training.ema import WeightAverage, prediction_weights
from segmamba.training.feed import Feed
from segmamba.training.fold_folder import FoldFolder
from segmamba.training.interrupt import Interrupt, Interrupted
from segmamba.training.logger import RunLogger, overall_score
from segmamba.training.optimizer import build_optimizer, set_learning_rate
from segmamba.training.outcome import Outcome, send
from segmamba.training.replay import GradientReplay
from segmamba.training.results import Pace, Progress, TrainResult
from segmamba.training.schedule import learning_rate_at, progress_at, total_steps
from segmamba.training.shallow_maps import avoid_depth_two
from segmamba.training.snapshot import run_identity
from segmamba.training.state import TrainState, check_config
from segmamba.training.store import RunStore
from segmamba.types import JsonDict

SKIPS_ALLOWED = 20
"""Steps in a row that fp16 may skip: 2^20 covers the whole range of its scale."""

_log = logging.getLogger(__name__)


class Trainer:
    """Trains one network into one folder; the loss and all else are values.

    Args:
        network: Gives logits, or a list of them (deep supervision); moved to `device`.
        make_batch: From a step (from 0) to its batch: a pure function, called ahead of
            time from threads. `segmamba.training.batches.batch_maker` makes one.
        loss: From the network's outputs (float32) and the batch's labels to a scalar.
        config: How to train.
        folder: Gets `config.yaml`, `checkpoint.safetensors`, `model.safetensors`,
            `log.jsonl` and `tensorboard/`.
        plan_hash: What the data went through; a resumed run must have the same.
        split_hash: Which cases train and validate; a resumed run must have the same.
        device: "cpu", "cuda", "auto" or a torch device.
        validate: From the network (averaged weights, eval mode) to scores by name,
            which are logged. "score" is the one to raise; without it, the mean of all.
        on_progress: Called after each step.
        on_epoch: Called after each log line with the log's path, such as for a picture.
        model_metadata: JSON values to store in `model.safetensors`.
        memory_hint: What a step should take and what to lower, for the error that
            says that memory ran out.
        tensorboard: Write TensorBoard's files if it is installed.

    Raises:
        ConfigError: A setting is out of its range.
        BackendUnavailableError: The device is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        make_batch: Callable[[int], Batch],
        loss: Callable[[Any, Tensor], Tensor],
        config: TrainConfig,
        folder: Path | str,
        *,
        plan_hash: str = "",
        split_hash: str = "",
        device: torch.device | str = "cpu",
        validate: Callable[[nn.Module], JsonDict] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[Path], None] | None = None,
        model_metadata: JsonDict | None = None,
        memory_hint: str = "",
        tensorboard: bool = True,
    ) -> None:
        check_config(config)
        self.device = resolve_device(device)
        warn_if_slow(self.device)
        self.precision: Precision = precision_for(self.device, config.precision)
        self.network = network.to(self.device)
        if self.device.type == "cpu" and self.precision == "bf16":
            avoid_depth_two(self.network)
        self.make_batch = make_batch
        self.loss = loss
        self.config = config
        self.folder = FoldFolder(Path(folder))
        self.validate = validate
        self.on_progress = on_progress
        self.on_epoch = on_epoch
        self.memory_hint = memory_hint
        self.tensorboard = tensorboard
        self.state = TrainState()
        self.optimizer = build_optimizer(self.network, config)
        self.average = (
            None
            if config.ema_decay is None
            else WeightAverage(self.network, config.ema_decay)
        )
        self.scaler = torch.amp.GradScaler(  # pyright: ignore[reportPrivateImportUsage]
            self.device.type, enabled=self.precision == "fp16"
        )
        self.store = RunStore(
            self.folder,
            self.network,
            self.optimizer,
            self.average,
            self.scaler,
            self.precision,
            run_identity(self.network, config, plan_hash, split_hash),
            model_metadata or {},
        )
        # A GPU goes on while numbers arrive; only fp16's decide about the step.
        self._looks_late = self.device.type == "cuda" and self.precision != "fp16"
        self._replay = GradientReplay(
            self.network, self._gradients, wanted=self._looks_late
        )
        self._unseen: Outcome | None = None
        self._loss: float | None = None
        self._interrupt = Interrupt()
        self._note: str | None = None

    # ---------------------------------------------------------------- set up and fit

    def fit(self, resume: bool = False) -> TrainResult:
        """Train to the end, or go on to it.

        Args:
            resume: Go on with the folder's run. Where there is none, begin one.

        Returns:
            What the run ended with. A finished run that is resumed ends at once.

        Raises:
            ConfigError: The folder holds a run and `resume` is False; its settings
                differ; or another process trains into it.
            CheckpointError: A state can't be read or written.
            TrainingError: Not-a-number, or an interruption (after saving).
        """
        place = self.folder.path
        with folder_lock(place, "training"), explained(place, self.memory_hint):
            self._begin(resume)
            if not self._is_settled():
                self._run()
        return self._result()

    def _begin(self, resume: bool) -> None:
        if resume:
            self._load()
        else:
            self.folder.refuse_to_overwrite()
        self._started = self._saved_at = time.monotonic()
        self._saved_place = (self.state.step, self.state.epoch)
        self._pace = Pace(self._progress())

    def _run(self) -> None:
        stop = total_steps(self.config)
        with (
            self._interrupt.watching(),
            RunLogger(
                self.folder.path,
                first_epoch=self.state.epoch,
                tensorboard=self.tensorboard,
            ) as self._logger,
            Feed(
                self.make_batch,
                self.device,
                self.state.step,
                None if math.isinf(stop) else int(stop),
                self.config.workers,
            ) as self._feed,
        ):
            self.folder.write_config(self.config)
            self.store.mark_model(finished=False)  # a longer run may follow a finished
            try:
                self._loop()
            except Interrupted as signal:
                self.save()
                text = explain_interruption(signal, self.state.step, self.folder.path)
                raise TrainingError(text) from signal

    def _loop(self) -> None:
        self.network.train()
        while True:
            if self._epoch_is_full():
                self._finish_epoch()
            if self._save_is_due():
                self.save()
            if self._is_over():
                break
            self._interrupt.check()
            self._step(self._feed.next())
        if self.state.step > self.state.epoch_step:  # the clock cut it short
            self._finish_epoch()
        self.save()
        self.store.mark_model(finished=True)

    # -------------------------------------------------------------------------- step

    def _step(self, batch: Batch) -> None:
        """Do one step of gradient descent."""
        state, config = self.state, self.config
        learning_rate = learning_rate_at(self._progress(), config)
        set_learning_rate(self.optimizer, learning_rate)
        torch.manual_seed(config.seed + state.step)  # for networks that draw numbers
        if self._replay.takes(batch):
            loss, norm = self._replay(batch)
            self._look()  # at the step before, if nobody has yet
        else:
            loss, norm = self._gradients(batch)
        is_late = self._looks_late and self._loss is not None
        place = (state.step, batch, learning_rate, self.precision)
        self._unseen = Outcome(*place, is_late, send(loss, norm))
        if is_late or self._look():
            self._update()
        self.scaler.update()
        state.step += 1
        state.epoch_patches += len(batch.image)
        self._pace.patches += len(batch.image)
        self._report(learning_rate)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Give loss and gradient norm; the network gets its gradients anew."""
        loss = self._forward(batch)
        if not self._is_recorded():
            self._look()  # while the GPU has something to do
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_grad_norm or math.inf
        parameters = list(self.network.parameters())
        gradients = [item.grad for item in parameters if item.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # A norm of nan would make every gradient nan and hide which one was it first.
        nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(nan=0.0))
        return loss.detach(), norm

    def _is_recorded(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _forward(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.precision):
            outputs = self.network(batch.image)
        if isinstance(outputs, Tensor):
            return self.loss(outputs.float(), batch.label)
        return self.loss([output.float() for output in outputs], batch.label)

    def _update(self) -> None:
        """Change the weights."""
        self.scaler.step(self.optimizer)
        if self.average is not None:
            self.average.update(self.state.updates)
        self.state.updates += 1

    def _look(self) -> bool:
        """See whether loss and gradient of the unseen step are finite; count them."""
        state, outcome, self._unseen = self.state, self._unseen, None
        if outcome is None:
            return True
        loss, norm = outcome.numbers.tolist()
        self._loss = loss
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip_or_stop(outcome, loss, norm)
            return False
        state.skipped_in_a_row = 0
        state.epoch_updates += 1
        state.loss_sum += loss
        state.norm_sum += norm
        return True

    def _skip_or_stop(self, outcome: Outcome, loss: float, norm: float) -> None:
        """Skip the step if fp16 merely overflowed; else stop and say why."""
        self.state.skipped_in_a_row += 1
        if (
            self.precision != "fp16"
            or self.state.skipped_in_a_row > SKIPS_ALLOWED
            or not is_finite(outcome.batch)
        ):
            raise TrainingError(outcome.explain(self.network, loss, norm))

    # ---------------------------------------------------------------- epoch, validate

    def _finish_epoch(self) -> None:
        """Validate if it is due, log, and begin the next epoch."""
        state = self.state
        self._look()
        seconds = self._elapsed_s() - state.epoch_started_s
        peak = peak_memory_mib(self.device)  # before validation, which isn't training
        scores = self._scores()
        state.last_loss = state.mean_loss()
        line = {
            **state.epoch_summary(seconds),
            "progress": self._progress(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "elapsed_s": self._elapsed_s(),
            "waited_s": self._feed.waited_s(),
            "peak_memory_mib": peak,
        }
        if scores:
            line["validation"] = scores
        self._logger.write(line)
        state.begin_epoch(self._elapsed_s())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.on_epoch is not None:
            self.on_epoch(self._logger.path)

    def _scores(self) -> JsonDict:
        """Validate at the end of every so many whole epochs."""
        due = (self.state.epoch + 1) % self.config.validate_every == 0
        if self.validate is None or not due or not self._epoch_is_full():
            return {}
        with (
            prediction_weights(self.network, self.average) as network,
            self._interrupt.acting_at_once(),
        ):
            scores = self.validate(network)
        if (
            self.state.note_score(overall_score(scores))
            and self.config.patience is not None
        ):
            self.store.save_model(self.state)
        return scores

    # -------------------------------------------------------------------- save, load

    def save(self) -> None:
        """Write everything needed to go on, and the weights for prediction."""
        place = (self.state.step, self.state.epoch)
        lacking = self.store.model_header() is None
        if place != self._saved_place or lacking or not self.folder.checkpoint.exists():
            self._look()
            keeps_best = self.config.patience is not None
            if lacking or not keeps_best or self.state.best_score is None:
                self.store.save_model(self.state)
            self.store.save_state(
                dataclasses.replace(self.state, elapsed_s=self._elapsed_s())
            )
        self._saved_place = place
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        """Go back to where the folder's run stood, if there is one."""
        loaded = self.store.load()
        if loaded is None:
            return
        self.state, self._note = loaded
        last = progress_at(
            max(self.state.step - 1, 0), self.state.elapsed_s, self.config
        )
        set_learning_rate(self.optimizer, learning_rate_at(last, self.config))
        if self._note is not None:
            _log.warning(self._note)

    # ------------------------------------------------------------- where the run is

    def _elapsed_s(self) -> float:
        return self.state.elapsed_s + time.monotonic() - self._started

    def _progress(self) -> float:
        return progress_at(self.state.step, self._elapsed_s(), self.config)

    def _epoch_is_full(self) -> bool:
        steps = self.state.step - self.state.epoch_step
        return steps >= self.config.iterations_per_epoch

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.config.save_every_s

    def _lost_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.state.validations_since_best >= patience

    def _is_over(self) -> bool:
        return self._progress() >= 1 or self._lost_patience()

    def _is_settled(self) -> bool:
        """Tell whether a resumed run has nothing left to do."""
        model = self.store.model_header() or {}
        epoch_is_open = self.state.step > self.state.epoch_step
        return self._is_over() and not epoch_is_open and model.get("finished", False)

    def _report(self, learning_rate: float) -> None:
        if self.on_progress is None or self._loss is None:
            return
        place = (self.state.step, self.state.epoch + 1, self._progress())
        self.on_progress(self._pace.progress(*place, self._loss, learning_rate))

    def _result(self) -> TrainResult:
        patience = self._lost_patience() and self._progress() < 1
        return TrainResult(
            step=self.state.step,
            epoch=self.state.epoch,
            elapsed_s=self._elapsed_s(),
            loss=self.state.last_loss,
            best_score=self.state.best_score,
            stopped="patience" if patience else "finished",
            model_path=self.folder.model,
            checkpoint_path=self.folder.checkpoint,
            log_path=self.folder.log,
            note=self._note,
        )
