"""Hold what predictions say of themselves to references."""

from __future__ import annotations

from pathlib import Path

from segmamba.atomic import read_json
from segmamba.data.parallel import for_each_case
from segmamba.errors import FormatError, describe
from segmamba.evaluation.calibration import (
    AREAS,
    Reliability,
    describe_scores,
    reliability_of_case,
)
from segmamba.evaluation.references import Pair, pair_files
from segmamba.io import read_volume
from segmamba.manifest import NAME
from segmamba.types import JsonDict


def calibrate(
    metrics: JsonDict, predictions: Path | str, references: Path | str
) -> JsonDict:
    """Say how well uncertainty tells of errors.

    Args:
        metrics: What `evaluate_folder` gave for these files.
        predictions: Folder that `predict` with uncertainty wrote.
        references: As given to `evaluate_folder`.

    Returns:
        "reliability": for the voxels to which the prediction gives a label, and for
        all, their ECE and bins; "scores": what `describe_scores` gives.

    Raises:
        FormatError: A prediction was made without uncertainty.
    """
    folder = Path(predictions)
    pairs = pair_files(folder, references, allow_missing=True).pairs
    doubts = _doubts(folder, pairs)

    def count(pair: Pair) -> dict[str, Reliability]:
        found, truth = (read_volume(p) for p in (pair.prediction, pair.reference))
        sure = read_volume(folder / "confidence" / f"{pair.id}.nii.gz")
        return reliability_of_case(found.array[0], truth.array[0], sure.array[0])

    total = {area: Reliability() for area in AREAS}
    for case in for_each_case(count, pairs):
        for area, counts in case.items():
            for name, values in vars(counts).items():
                getattr(total[area], name)[:] += values
    return {
        "reliability": {area: counts.describe() for area, counts in total.items()},
        "scores": describe_scores(doubts, metrics["cases"]),
    }


def _doubts(folder: Path, pairs: tuple[Pair, ...]) -> dict[str, JsonDict]:
    """Give each case's uncertainty from the folder's manifest."""
    path = folder / NAME
    cases = read_json(path)["cases"] if path.is_file() else {}
    found = {pair.id: cases.get(pair.id, {}).get("uncertainty") for pair in pairs}
    lacking = [name for name, doubt in found.items() if doubt is None]
    if lacking:
        raise FormatError(
            describe(
                "predictions say nothing of their uncertainty",
                expected="the manifest of 'segmamba predict --uncertainty'",
                found=f"none for {', '.join(lacking[:5])}",
                file=path,
                remedy="Predict anew with --uncertainty --overwrite.",
            )
        )
    return found
