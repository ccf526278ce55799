"""From an evaluation's scores to a picture of the cases that went worst."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts import load_label_scheme
from segmamba.errors import FormatError, describe
from segmamba.evaluation.references import Pair, pair_files
from segmamba.io import read_case, read_volume
from segmamba.report.figures import Picture, worst_case_ids, worst_cases_figure
from segmamba.types import Array, JsonDict


def worst_cases(
    metrics: JsonDict,
    predictions: Path | str,
    references: Path | str | Dataset,
    output: Path | str,
    *,
    labels: Path | str | LabelScheme | None = None,
    count: int = 4,
    channel: int | None = None,
) -> list[str]:
    """Draw the cases with the lowest mean Dice, worst first.

    Args:
        metrics: What `evaluate_folder` gave for these files.
        predictions: As given to `evaluate_folder`.
        references: As given to `evaluate_folder`; a data set also gives the images.
        output: PNG file to write, atomically.
        labels: As given to `evaluate_folder`.
        count: How many cases at most, 1 or more.
        channel: Which image channel to show; None for the last, FLAIR in BraTS.

    Returns:
        The ids of the cases drawn.

    Raises:
        FormatError: Files are missing or unreadable, or the metrics have no case.
    """
    pairing = pair_files(predictions, references, allow_missing=True)
    pairs = {pair.id: pair for pair in pairing.pairs}
    chosen = [name for name in worst_case_ids(metrics, count) if name in pairs]
    if not chosen:
        raise FormatError(
            describe(
                "no case to draw",
                expected="scores of the cases in the folder",
                found=f"{len(metrics['cases'])} scored, {len(pairs)} pairs of files",
                file=predictions,
            )
        )
    images = pairing.images
    pictures = [
        _picture(pairs[name], images.get(name), metrics["cases"][name], channel)
        for name in chosen
    ]
    worst_cases_figure(pictures, output, labels=_scheme(labels) or pairing.labels)
    return chosen


def _scheme(labels: Path | str | LabelScheme | None) -> LabelScheme | None:
    if labels is None or isinstance(labels, LabelScheme):
        return labels
    return load_label_scheme(labels)


def _picture(
    pair: Pair, case: Case | None, rows: JsonDict, channel: int | None
) -> Picture:
    reference = read_volume(pair.reference)
    image = _blank(reference.array[0])
    if case is not None:
        channels = read_case(case.images, frame=case.frame).array
        image = channels[-1 if channel is None else channel]
    return Picture(
        title=pair.id,
        image=image,
        reference=reference.array[0].astype(np.int32),
        prediction=read_volume(pair.prediction).array[0].astype(np.int32),
        affine=reference.affine,
        scores={name: row["dice"] for name, row in rows.items()},
    )


def _blank(like: Array) -> Array:
    """Stand in for an image: black, with room for the labels."""
    return np.zeros(like.shape, np.float32)
