"""Weights kept on the way: more samples for the uncertainty of predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from segmamba.inference.load import SNAPSHOTS
from segmamba.training.fold_folder import FoldFolder
from segmamba.training.logger import read_log
from segmamba.training.trainer import Trainer

FIRST_SHARE = 0.5
"""Share of the training after which snapshots begin."""


def snapshot_keeper(trainer: Trainer, count: int) -> Callable[[Path], None]:
    """Give a function that keeps the weights that predict, at even steps of a run.

    Args:
        trainer: The training.
        count: Snapshots in all; 0 keeps none.

    Returns:
        To be called with the log's path at the end of each epoch. At the first one
        after each share that `snapshots_due` names, it writes
        `snapshots/<number>/model.safetensors` into the fold's folder.
    """

    def keep(log: Path) -> None:
        shares = [line["progress"] for line in read_log(log)[-2:]]
        before, now = [0.0, *shares][-2:]
        number = snapshots_due(now, count)
        if number > snapshots_due(before, count):
            place = FoldFolder(log.parent / SNAPSHOTS / str(number))
            dataclasses.replace(trainer.store, folder=place).save_model(trainer.state)

    return keep


def snapshots_due(progress: float, count: int) -> int:
    """Count the snapshots that should be there.

    Number i (from 1) is due once the share 1/2 + (i - 1) / (2·count) is over.

    Args:
        progress: Share of the training that is over, 0 to 1.
        count: Snapshots in all.

    Returns:
        0 to `count`.
    """
    if progress < FIRST_SHARE:
        return 0
    return min(count, 1 + int(count * (progress - FIRST_SHARE) / (1 - FIRST_SHARE)))
