"""A run on disk: the state to go on from, and the weights for prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from segmamba import checkpoint
from segmamba.config import to_dict
from segmamba.errors import CheckpointError
from segmamba.training.diagnosis import explain_misfit, require_finite
from segmamba.training.ema import WeightAverage
from segmamba.training.fold_folder import FoldFolder
from segmamba.training.snapshot import (
    network_config,
    restore_run_tensors,
    run_tensors,
)
from segmamba.training.state import TrainState, check_resumable
from segmamba.types import JsonDict


@dataclass(frozen=True)
class RunStore:
    """Writes what a run holds to its folder and reads it back."""

    folder: FoldFolder
    """Where the files lie."""
    network: nn.Module
    """Its weights are saved and restored."""
    optimizer: Optimizer
    """Its state too."""
    average: WeightAverage | None
    """The averaged weights, if there are any; then these predict."""
    scaler: Any
    """The GradScaler of fp16; disabled otherwise."""
    precision: str
    """Autocast type, for the record."""
    identity: JsonDict
    """What `run_identity` gives: a saved run must have the same."""
    model_metadata: JsonDict
    """The caller's values for `model.safetensors`."""

    def save_state(self, state: TrainState) -> None:
        """Write everything needed to go on; the generation before it is kept.

        Raises:
            CheckpointError: The file can't be written.
            TrainingError: Weights are not finite.
        """
        self._require_finite(state)
        metadata = {
            "kind": "training state",
            "state": to_dict(state),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "seed": self.identity["config"]["seed"],
            "versions": checkpoint.versions(),
            **self.identity,
        }
        checkpoint.save_checkpoint(
            self.folder.checkpoint,
            run_tensors(self.network, self.optimizer, self.average),
            metadata,
            keep_previous=True,
        )

    def save_model(self, state: TrainState) -> None:
        """Write the weights for prediction, marked as still in training.

        Raises:
            CheckpointError: The file can't be written.
            TrainingError: Weights are not finite.
        """
        self._require_finite(state)
        metadata = {
            **self.model_metadata,
            "plan_hash": self.identity["plan_hash"],
            "split_hash": self.identity["split_hash"],
            "step": state.step,
            "weights": "last" if self.average is None else "ema",
            "best_score": state.best_score,
            "finished": False,
        }
        average = self.average
        checkpoint.save_model(
            self.folder.model,
            self.network.state_dict() if average is None else average.tensors,
            network=network_config(self.network),
            metadata=metadata,
        )

    def mark_model(self, *, finished: bool) -> None:
        """Write into the weights for prediction whether training is over.

        Raises:
            CheckpointError: The file is damaged or can't be written.
        """
        header = self.model_header()
        if header is not None and header.get("finished") != finished:
            checkpoint.update_model(self.folder.model, finished=finished)

    def model_header(self) -> JsonDict | None:
        """Give what the weights for prediction say of themselves.

        Returns:
            Their metadata; None if they are missing or unreadable.
        """
        try:
            return checkpoint.load_model_metadata(self.folder.model)
        except CheckpointError:
            return None

    def _require_finite(self, state: TrainState) -> None:
        averages = [] if self.average is None else self.average.tensors.values()
        require_finite([*self.network.state_dict().values(), *averages], state.step)

    def load(self) -> tuple[TrainState, str | None] | None:
        """Put back the weights and all else of the folder's run.

        Returns:
            Where the run stood, and a note if an older state had to be taken; None
            where there is no run.

        Raises:
            ConfigError: The run was begun with other settings or cases.
            CheckpointError: Its state can't be read, or doesn't fit the network.
        """
        loaded = checkpoint.load_latest_checkpoint(self.folder.checkpoint)
        if loaded is None:
            return None
        if loaded.metadata.get("kind") != "training state":
            raise CheckpointError(explain_misfit(loaded.path, "weights for prediction"))
        check_resumable(loaded.metadata, self.identity, loaded.path)
        try:
            restore_run_tensors(
                loaded.tensors, self.network, self.optimizer, self.average
            )
            if self.scaler.is_enabled() and loaded.metadata["scaler"]:
                self.scaler.load_state_dict(loaded.metadata["scaler"])
            state = TrainState(**loaded.metadata["state"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(explain_misfit(loaded.path, str(error))) from error
        return state, loaded.note
