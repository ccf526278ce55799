"""What a step came to, which may be known only after the next one has begun."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segmamba.data.augment import Batch
from segmamba.devices import Arriving
from segmamba.training.diagnosis import explain_not_finite


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of a step, and what an error says of it."""

    step: int
    """The step, from 0."""
    batch: Batch
    """What it was given."""
    learning_rate: float
    """Its learning rate."""
    precision: str
    """Its autocast type."""
    is_late: bool
    """Whether it has changed the weights before anybody looks at it."""
    numbers: Arriving
    """Loss and norm."""

    def explain(self, network: nn.Module, loss: float, norm: float) -> str:
        """Say what was not finite, while the network has the step's gradients."""
        return explain_not_finite(
            network,
            self.batch,
            step=self.step,
            loss=loss,
            norm=norm,
            learning_rate=self.learning_rate,
            precision=self.precision,
            updated=self.is_late,
        )


def send(loss: Tensor, norm: Tensor) -> Arriving:
    """Send loss and gradient norm, two scalars, to the CPU in one transfer."""
    return Arriving(torch.stack([loss.detach().float(), norm.float()]))
