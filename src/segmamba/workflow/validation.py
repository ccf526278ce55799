"""Scores on whole volumes: quick ones while training, the real ones at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segmamba import atomic
from segmamba.data.cache import Cache
from segmamba.data.dataset import Dataset
from segmamba.data.labels import LabelScheme
from segmamba.errors import SegMambaError, describe
from segmamba.evaluation.evaluate import evaluate_folder
from segmamba.evaluation.metrics import dice
from segmamba.inference.cases import InputCase, predict_cases
from segmamba.inference.load import load_model
from segmamba.inference.sliding_window import sliding_window_logits
from segmamba.types import JsonDict, Size3
from segmamba.workflow.folder import Progress, RunFolder, staged

QUICK_CASES = 8
"""Held-out cases that are scored while training; the end scores them all."""


def quick_validation(
    cache: Cache,
    case_ids: Sequence[str],
    scheme: LabelScheme,
    patch_size: Size3,
    *,
    device: torch.device,
    precision: str,
) -> Callable[[nn.Module], dict[str, float]]:
    """Give a function that scores a network on whole cached volumes.

    It takes few cases, no mirroring and the network's own grid: good for a curve and
    for early stopping, not for a report.

    Args:
        cache: Preprocessed cases.
        case_ids: Held-out cases; at most eight of them, evenly spread, are used.
        scheme: The labels' meaning.
        patch_size: Window along (D, H, W).
        device: Where the network is.
        precision: Of the forward pass.

    Returns:
        From a network to the mean Dice of each label, and their mean as "score".
    """
    count = min(QUICK_CASES, len(case_ids))
    chosen = [case_ids[i * len(case_ids) // count] for i in range(count)]

    def validate(network: nn.Module) -> dict[str, float]:
        rows = [
            _score(network, cache, case_id, scheme, patch_size, device, precision)
            for case_id in chosen
        ]
        scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return {**scores, "score": float(np.mean(list(scores.values())))}

    return validate


def _score(
    network: nn.Module,
    cache: Cache,
    case_id: str,
    scheme: LabelScheme,
    patch_size: Size3,
    device: torch.device,
    precision: str,
) -> dict[str, float]:
    case = cache.load(case_id)
    logits = sliding_window_logits(
        network,
        torch.from_numpy(np.asarray(case.image, np.float32)),
        patch_size,
        mirror_axes=(),
        device=device,
        precision=precision,
        case=case_id,
    )
    found, truth = scheme.decode(logits.cpu().numpy()), np.asarray(case.label)
    if scheme.ignore_label is not None:
        found[truth == scheme.ignore_label] = 0
    return {
        name: dice(np.isin(found, group), np.isin(truth, group))
        for name, group in scheme.evaluated.items()
    }


def final_validation(
    dataset: Dataset,
    case_ids: Sequence[str],
    run: RunFolder,
    fold: str,
    *,
    device: torch.device,
    precision: str = "auto",
    progress: Progress | None = None,
) -> JsonDict:
    """Predict the held-out cases from their files as a user would, and score them.

    Writes label maps to `validation/` and scores to `metrics.json` in the fold. There
    is no post-processing: it is decided from these label maps.

    Args:
        dataset: The data set.
        case_ids: The held-out cases.
        run: The run.
        fold: Its fold.
        device: Where to predict.
        precision: Of the forward pass.
        progress: Called with the cases done, all cases, and what is being done.

    Returns:
        What `metrics.json` holds.

    Raises:
        SegMambaError: A case could not be predicted.
    """
    folder = run.fold(fold)
    held_out = [case for case in dataset.cases if case.id in set(case_ids)]
    inputs = [InputCase(case.id, case.images, frame=case.frame) for case in held_out]
    predictor = load_model(
        run.root, device, fold, precision=precision, postprocessing=False
    )
    summary = predict_cases(
        predictor,
        inputs,
        folder / "validation",
        overwrite=True,
        progress=staged(progress, "validating"),
    )
    if summary.failed:
        raise SegMambaError(_failed(summary.failed, folder))
    metrics = evaluate_folder(folder / "validation", dataset, labels=dataset.labels)
    atomic.write_json(folder / "metrics.json", metrics)
    return metrics


def _failed(failed: dict[str, str], folder: Path) -> str:
    case, problem = next(iter(failed.items()))
    return describe(
        f"{len(failed)} held-out cases could not be predicted",
        found=f"{case}: {problem}",
        file=folder,
        remedy="The trained weights are kept. Mend the cases and run with --resume.",
    )
