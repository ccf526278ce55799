"""A training of a few milliseconds a step: find bright blobs in noise.

Imported by the tests, and run as a program by those that kill it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from segmamba.config import TrainConfig
from segmamba.data.augment import Batch
from segmamba.training import Trainer

SIZE = 12

CONFIG = TrainConfig(
    max_epochs=4,
    iterations_per_epoch=5,
    learning_rate=0.05,
    momentum=0.9,
    save_every_s=0,
    ema_decay=0.9,
    precision="fp32",
    validate_every=1,
)


class TinyNetwork(nn.Module):
    """Two convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.last = nn.Conv3d(width, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(image)))


def make_batch(step: int) -> Batch:
    """Noise with a bright ball at a place that depends on the step."""
    generator = torch.Generator().manual_seed(step)
    center = torch.rand(2, 3, 1, 1, 1, generator=generator) * 4 + SIZE / 2 - 2
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIZE)] * 3, indexing="ij"))
    label = ((grid - center) ** 2).sum(1) < 9
    image = 0.5 * torch.randn(2, 1, SIZE, SIZE, SIZE, generator=generator)
    return Batch(image + 2.0 * label[:, None], label.to(torch.int16))


def loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(logits, label.long())


def dice(network: nn.Module, step: int = 10_000) -> float:
    """Dice of the ball on a batch that training never saw."""
    batch = make_batch(step)
    with torch.no_grad():
        found = network(batch.image).argmax(1).bool()
    truth = batch.label.bool()
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def make_trainer(folder: Path, config: TrainConfig = CONFIG, **options) -> Trainer:
    """Build the trainer of these tests, always from the same weights."""
    torch.manual_seed(7)
    chosen = {
        "network": TinyNetwork(),
        "make_batch": make_batch,
        "loss": loss,
        "tensorboard": False,
        "validate": lambda network: {"score": dice(network)},
        **options,
    }
    return Trainer(config=config, folder=folder, **chosen)


def main() -> None:
    """Train into the folder of the first argument, slowly enough to be killed."""
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, max_epochs=12, optimizer="adamw")
    folder = Path(sys.argv[1])
    trainer = make_trainer(folder, config, on_progress=lambda _: time.sleep(0.01))
    trainer.fit(resume=True)


if __name__ == "__main__":
    main()
