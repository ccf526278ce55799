"""Where a run stands, and whether a saved one may be gone on with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from segmamba.config import AugmentationConfig, TrainConfig, from_dict, to_dict
from segmamba.errors import ConfigError, describe
from segmamba.training.schedule import DEFAULT_EPOCHS
from segmamba.types import JsonDict

LIMITS = ("max_epochs", "max_time_s")
"""Settings that may grow when a run is gone on with."""

FREE = ("workers", "save_every_s", "snapshots")
"""Settings that change nothing in the result, so they may change at any time."""


@dataclass
class TrainState:
    """All numbers that training carries from step to step, weights aside."""

    step: int = 0
    """Batches seen."""
    updates: int = 0
    """Steps that changed the weights: all but those that fp16 skipped."""
    skipped_in_a_row: int = 0
    """Steps that fp16 has skipped since the last update."""
    epoch: int = 0
    """Epochs finished, logged and, if due, validated."""
    epoch_step: int = 0
    """The step at which the present epoch began."""
    epoch_started_s: float = 0.0
    """Seconds of training at which it began."""
    elapsed_s: float = 0.0
    """Seconds of training, all resumed parts together."""
    loss_sum: float = 0.0
    """Sum of the epoch's losses."""
    norm_sum: float = 0.0
    """Sum of the epoch's gradient norms before clipping."""
    epoch_updates: int = 0
    """Updates that those sums hold."""
    epoch_patches: int = 0
    """Patches seen in the epoch."""
    last_loss: float | None = None
    """Mean loss of the last finished epoch."""
    best_score: float | None = None
    """Highest validation score."""
    best_epoch: int | None = None
    """The epoch that had it."""
    validations_since_best: int = 0
    """Validations after that one."""

    def mean_loss(self) -> float:
        """Give the mean loss of the epoch so far."""
        return self.loss_sum / max(self.epoch_updates, 1)

    def epoch_summary(self, seconds: float) -> JsonDict:
        """Give what the log says of the present epoch, which took so many seconds."""
        return {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": self.mean_loss(),
            "gradient_norm": self.norm_sum / max(self.epoch_updates, 1),
            "skipped_steps": self.step - self.epoch_step - self.epoch_updates,
            "seconds": seconds,
            "patches_per_s": self.epoch_patches / max(seconds, 1e-9),
        }

    def begin_epoch(self, elapsed_s: float) -> None:
        """Count one more finished epoch and empty the sums."""
        self.epoch += 1
        self.epoch_step = self.step
        self.epoch_started_s = elapsed_s
        self.loss_sum = self.norm_sum = 0.0
        self.epoch_updates = self.epoch_patches = 0

    def note_score(self, score: float) -> bool:
        """Remember a validation's score and tell whether it is the best one."""
        best = -math.inf if self.best_score is None else self.best_score
        if math.isfinite(score) and score > best:
            self.best_score, self.best_epoch = score, self.epoch + 1
            self.validations_since_best = 0
            return True
        self.validations_since_best += 1
        return False


def check_resumable(saved: JsonDict, wanted: JsonDict, file: Path) -> None:
    """See that a saved run and the wanted one are the same but for their length.

    Args:
        saved: What `run_identity` gave, from the checkpoint.
        wanted: The same of the run that wants to go on.
        file: The checkpoint, for the message.

    Raises:
        ConfigError: They differ; the keys are named with both values.
    """
    if saved.get("split_hash") != wanted.get("split_hash"):
        raise ConfigError(_other_cases(saved, wanted, file))
    differing = [
        f"{key} {saved.get(key)!r} -> {wanted.get(key)!r}"
        for key in ("network", "plan_hash")
        if saved.get(key) != wanted.get(key)
    ]
    differing += _differing_settings(saved["config"], wanted["config"])
    if differing:
        raise ConfigError(
            describe(
                "can't go on with these settings",
                expected="those that the run began with (max_epochs and max_time_s "
                "may grow)",
                found="; ".join(differing),
                file=file,
                remedy="Use the earlier settings, or train into another folder.",
            )
        )


def _other_cases(saved: JsonDict, wanted: JsonDict, file: Path) -> str:
    return describe(
        "the fold's cases are others than those its training began with",
        expected=f"the training and validation ids with hash {saved.get('split_hash')}",
        found=wanted.get("split_hash"),
        file=file,
        remedy="Put splits.json (with fold all, the data set) back as it was, or train "
        "into another run folder: scores on cases that were trained on mean nothing.",
    )


def check_config(config: TrainConfig) -> None:
    """See that the numbers of a configuration make sense.

    Raises:
        ConfigError: One is out of its range; all such are named.
    """
    wrong = [
        f"{name} = {getattr(config, name)!r} (should be {rule})"
        for name, rule, is_right in _RULES
        if getattr(config, name) is not None and not is_right(getattr(config, name))
    ]
    wrong += _wrong_changes(config.augmentation)
    if wrong:
        raise ConfigError(describe("bad training settings", found="; ".join(wrong)))


def _wrong_changes(config: AugmentationConfig) -> list[str]:
    wrong = [
        f"augmentation.{name} = {value!r} (should be from 0 to 1)"
        for name, value in to_dict(config).items()
        if name.startswith("p_") and not 0 <= value <= 1
    ]
    if not 0 < config.scaling[0] <= config.scaling[1]:
        rule = "above 0, the smaller one first"
        wrong.append(f"augmentation.scaling = {config.scaling} (should be {rule})")
    return wrong


_RULES = (
    ("max_epochs", "1 or more", lambda value: value >= 1),
    ("max_time_s", "more than 0", lambda value: value > 0),
    ("iterations_per_epoch", "1 or more", lambda value: value >= 1),
    ("batch_size", "1 or more", lambda value: value >= 1),
    ("learning_rate", "more than 0", lambda value: 0 < value < math.inf),
    ("momentum", "from 0 to below 1", lambda value: 0 <= value < 1),
    ("weight_decay", "0 or more", lambda value: 0 <= value < math.inf),
    ("warmup", "from 0 to below 1", lambda value: 0 <= value < 1),
    ("clip_grad_norm", "more than 0", lambda value: value > 0),
    ("ema_decay", "from 0 to below 1", lambda value: 0 <= value < 1),
    ("validate_every", "1 or more", lambda value: value >= 1),
    ("save_every_s", "0 or more", lambda value: value >= 0),
    ("patience", "1 or more", lambda value: value >= 1),
    ("workers", "0 or more", lambda value: value >= 0),
    ("snapshots", "0 or more", lambda value: value >= 0),
)


def _differing_settings(saved: JsonDict, wanted: JsonDict) -> list[str]:
    # Through the dataclass, so that lists and tuples compare alike.
    old = to_dict(from_dict(TrainConfig, saved, source="the checkpoint"))
    new = to_dict(from_dict(TrainConfig, wanted))
    differing = [
        f"{key} {old[key]!r} -> {new[key]!r}"
        for key in old
        if key not in LIMITS + FREE and old[key] != new[key]
    ]
    old_limits, new_limits = _limits(old), _limits(new)
    return differing + [
        f"{key} {old[key]!r} -> {new[key]!r}"
        for key in LIMITS
        if new_limits[key] < old_limits[key]
    ]


def _limits(config: JsonDict) -> dict[str, float]:
    if config["max_epochs"] is None and config["max_time_s"] is None:
        return {"max_epochs": DEFAULT_EPOCHS, "max_time_s": math.inf}
    return {key: math.inf if config[key] is None else config[key] for key in LIMITS}
