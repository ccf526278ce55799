"""Training: schedule, optimiser, averaged weights, trainer and its log."""

from __future__ import annotations

from segmamba.training.batches import batch_maker
from segmamba.training.logger import read_log
from segmamba.training.results import Progress, TrainResult
from segmamba.training.trainer import Trainer

__all__ = [
    "Progress",
    "TrainResult",
    "Trainer",
    "batch_maker",
    "read_log",
]
