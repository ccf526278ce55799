"""What training tells its caller."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """What a caller shows after each step."""

    step: int
    """Steps done."""
    epoch: int
    """The epoch going on, from 1."""
    fraction: float
    """Share of the run that is over, 0 to 1."""
    loss: float
    """Loss of the step."""
    learning_rate: float
    """Learning rate of the step."""
    patches_per_s: float
    """Patches a second since `fit` began."""
    remaining_s: float
    """Seconds that are left, if all goes on at this pace."""


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    step: int
    """Steps done."""
    epoch: int
    """Epochs done; the last one may have been cut short by the clock."""
    elapsed_s: float
    """Seconds of training, all resumed parts together."""
    loss: float | None
    """Mean loss of the last epoch."""
    best_score: float | None
    """Highest validation score, if there was a validation."""
    stopped: str
    """Why it ended: "finished" or "patience"."""
    model_path: Path
    """Weights for prediction."""
    checkpoint_path: Path
    """State to go on from."""
    log_path: Path
    """One JSON line an epoch."""
    note: str | None = None
    """What the user should know, such as that an older checkpoint was used."""


@dataclass
class Pace:
    """Measures how fast training goes since `fit` began."""

    first_fraction: float
    """Share of the run that was over then."""
    patches: int = 0
    """Patches seen since then."""
    _began: float = field(default_factory=time.monotonic)

    def progress(
        self,
        step: int,
        epoch: int,
        fraction: float,
        loss: float,
        learning_rate: float,
    ) -> Progress:
        """Say where the run is and how fast it goes.

        Args:
            step: Steps done.
            epoch: The epoch going on, from 1.
            fraction: Share of the run that is over now.
            loss: Loss of the step.
            learning_rate: Learning rate of the step.

        Returns:
            The same, with patches a second and the seconds that are left.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        pace = max(fraction - self.first_fraction, 1e-12) / seconds
        return Progress(
            step=step,
            epoch=epoch,
            fraction=fraction,
            loss=loss,
            learning_rate=learning_rate,
            patches_per_s=self.patches / seconds,
            remaining_s=(1 - fraction) / pace,
        )
