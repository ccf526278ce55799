"""Score label maps against references."""

from __future__ import annotations

from pathlib import Path

from segmamba import atomic
from segmamba.evaluation.evaluate import evaluate_folder
from segmamba.evaluation.references import pair_files
from segmamba.manifest import Session, write_manifest
from segmamba.report.calibration_figure import calibration_figure
from segmamba.report.worst import worst_cases
from segmamba.types import JsonDict
from segmamba.workflow.calibration import calibrate
from segmamba.workflow.folder import Progress, staged


def evaluate(
    predictions: Path | str,
    references: Path | str,
    output: Path | str,
    *,
    labels: Path | str | None = None,
    tolerance_mm: float = 1.0,
    lesions: str | None = None,
    figure: Path | str | None = None,
    calibration: Path | str | None = None,
    progress: Progress | None = None,
) -> JsonDict:
    """Score label maps against references and write `metrics.json`.

    Args:
        predictions: A folder of label maps.
        references: A folder of label maps, or a data set.
        output: The JSON file to write.
        labels: A dataset.json that names labels and regions.
        tolerance_mm: Of the surface Dice.
        lesions: Score lesion by lesion too, by the rules of this BraTS 2023 task:
            "GLI", "SSA", "PED", "MEN" or "MET".
        figure: A PNG file for a picture of the worst cases.
        calibration: A PNG file for a picture of how well the predictions' uncertainty
            tells of their errors; its numbers go to "calibration".
        progress: Called with the cases done, all cases, and what is being done.

    Returns:
        What was written.

    Raises:
        FormatError: A prediction is missing or unreadable, or calibration is wanted of
            predictions without uncertainty.
        GeometryError: A prediction and its reference lie on different grids.
    """
    options: JsonDict = {"tolerance_mm": tolerance_mm, "lesions": lesions}
    with Session("evaluate") as session:
        metrics = evaluate_folder(
            predictions,
            references,
            labels=labels,
            progress=staged(progress, "evaluating"),
            **options,
        )
        if calibration is not None:
            metrics["calibration"] = calibrate(metrics, predictions, references)
            calibration_figure(metrics["calibration"], calibration)
        atomic.write_json(output, metrics)
        if figure is not None:
            worst_cases(metrics, predictions, references, figure, labels=labels)
    pairs = pair_files(predictions, references, allow_missing=True).pairs
    inputs = [path for pair in pairs for path in (pair.prediction, pair.reference)]
    inputs += [] if labels is None else [Path(labels)]
    outputs = [Path(name) for name in (output, figure, calibration) if name is not None]
    write_manifest(output, session, options, inputs, outputs)
    return metrics
