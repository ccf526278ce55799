"""Scores of whole label maps: one case, or folders of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from segmamba.data.dataset import Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts import load_label_scheme
from segmamba.data.parallel import for_each_case
from segmamba.errors import ConfigError, FormatError, GeometryError, describe
from segmamba.evaluation import metrics
from segmamba.evaluation.lesions import LesionRule, lesion_rule, lesion_scores
from segmamba.evaluation.references import Pair, pair_files
from segmamba.evaluation.summary import LESION_METRICS, summarize_cases
from segmamba.io import Volume, read_volume
from segmamba.io.geometry import describe_grid_difference
from segmamba.types import Array, JsonDict, Spacing3

Progress = Callable[[int, int, str], None]


def evaluate_case(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    scheme: LabelScheme | Mapping[str, tuple[int, ...]],
    *,
    tolerance_mm: float = 1.0,
    penalty_mm: float | None = None,
    lesions: LesionRule | str | None = None,
) -> dict[str, JsonDict]:
    """Score one label map.

    Args:
        prediction: (I, J, K) integers.
        reference: (I, J, K) integers. Its voxels of the scheme's ignore label count
            for nothing.
        spacing_mm: Edges of a voxel in mm.
        scheme: What the integers mean, or label name to the integers it unites.
        tolerance_mm: Of the surface Dice.
        penalty_mm: HD95 where one of two masks is empty; None for the diagonal of the
            image.
        lesions: Score lesion by lesion too, by this rule or that of this BraTS task.

    Returns:
        Label or region to {"dice", "hd95_mm", "hd95_max_mm", "surface_dice",
        "volume_ml", "reference_volume_ml", "volume_error_ml", "empty_reference",
        "empty_prediction"}, and the numbers of `lesion_scores`.

    Raises:
        GeometryError: The shapes differ.
    """
    if prediction.shape != reference.shape:
        raise GeometryError(
            describe(
                "label maps of different shapes can't be compared",
                expected=reference.shape,
                found=prediction.shape,
            )
        )
    penalty = penalty_mm
    if penalty is None:
        penalty = metrics.diagonal_mm(reference.shape, spacing_mm)
    groups = scheme.evaluated if isinstance(scheme, LabelScheme) else scheme
    rule = lesion_rule(lesions)
    margin = 0 if rule is None else rule.dilation_voxels
    prediction, reference = _without_margin(prediction, reference, margin)
    if isinstance(scheme, LabelScheme) and scheme.ignore_label is not None:
        prediction = np.where(reference == scheme.ignore_label, 0, prediction)
    scores = {}
    for name, group in groups.items():
        found, truth = np.isin(prediction, group), np.isin(reference, group)
        scores[name] = score_masks(
            found, truth, spacing_mm, tolerance_mm=tolerance_mm, penalty_mm=penalty
        )
        if rule is not None:
            scores[name].update(lesion_scores(found, truth, spacing_mm, rule))
    return scores


def score_masks(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    *,
    tolerance_mm: float,
    penalty_mm: float,
) -> JsonDict:
    """Score one mask; the distances are measured once for all metrics.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.
        tolerance_mm: Of the surface Dice.
        penalty_mm: HD95 where one of the masks is empty.

    Returns:
        The numbers of one label, see `evaluate_case`.
    """
    distances = metrics.surface_distances(prediction, reference, spacing_mm)
    volume = metrics.volume_ml(prediction, spacing_mm)
    reference_volume = metrics.volume_ml(reference, spacing_mm)
    empty_prediction, empty_reference = not prediction.any(), not reference.any()
    if distances is None:
        agree = empty_prediction and empty_reference
        pooled = directed = 0.0 if agree else penalty_mm
        near = float(agree)
    else:
        pooled = metrics.pooled_percentile(distances)
        directed = metrics.directed_percentile(distances)
        near = metrics.share_within(distances, tolerance_mm)
    return {
        "dice": metrics.dice(prediction, reference),
        "hd95_mm": pooled,
        "hd95_max_mm": directed,
        "surface_dice": near,
        "volume_ml": volume,
        "reference_volume_ml": reference_volume,
        "volume_error_ml": volume - reference_volume,
        "empty_reference": bool(empty_reference),
        "empty_prediction": bool(empty_prediction),
    }


def evaluate_folder(
    predictions: Path | str,
    references: Path | str | Dataset,
    *,
    labels: Path | str | LabelScheme | None = None,
    tolerance_mm: float = 1.0,
    penalty_mm: float | None = None,
    lesions: LesionRule | str | None = None,
    allow_missing: bool | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> JsonDict:
    """Score a folder of label maps.

    Args:
        predictions: Folder of label maps named by case, or one label map.
        references: The same, or a data set in any layout.
        labels: A dataset.json that names labels and regions, or the scheme itself;
            None takes the data set's, or each integer that occurs by itself.
        tolerance_mm: Of the surface Dice, 0 or more.
        penalty_mm: HD95 where one of two masks is empty; None for the diagonal of the
            image.
        lesions: Score lesion by lesion too, by this rule or that of this BraTS task.
        allow_missing: Whether references may lack a prediction; None allows it for
            a data set.
        workers: Threads; None for as many as there are cores.
        progress: Called with (done, total, case id).

    Returns:
        {"cases": {id: {label: numbers}}, "summary": {label: ...}, "mean": ...,
        "differing_voxels": ..., "unmatched": ..., "rules": ...}, ready for JSON.

    Raises:
        FormatError: Files are missing or unreadable, or nothing matches.
        GeometryError: A prediction lies on another grid than its reference.
        ConfigError: An option is out of range.
    """
    _check_options(tolerance_mm, penalty_mm)
    rule = lesion_rule(lesions)
    pairing = pair_files(predictions, references, allow_missing=allow_missing)
    scheme = pairing.labels if labels is None else _scheme(labels)
    groups = scheme or _groups_found(pairing.pairs, workers)

    def score(pair: Pair) -> tuple[dict[str, JsonDict], float]:
        found, truth = _read_pair(pair)
        if scheme is not None:
            _check_values(found, scheme)
        scores = evaluate_case(
            found.array[0],
            truth.array[0],
            truth.spacing_mm,
            groups,
            tolerance_mm=tolerance_mm,
            penalty_mm=penalty_mm,
            lesions=rule,
        )
        return scores, differing_share(found.array[0], truth.array[0])

    rows = for_each_case(score, pairing.pairs, workers=workers, progress=progress)
    names = [pair.id for pair in pairing.pairs]
    cases = {name: scores for name, (scores, _) in zip(names, rows, strict=True)}
    shares = {name: share for name, (_, share) in zip(names, rows, strict=True)}
    summary = summarize_cases(cases)
    return {
        "cases": cases,
        "summary": summary,
        "mean": _mean_over_labels(summary),
        "differing_voxels": {"largest": max(shares.values()), "cases": shares},
        "unmatched": {
            "references": list(pairing.references_alone),
            "predictions": list(pairing.predictions_alone),
        },
        "rules": describe_rules(tolerance_mm, penalty_mm, rule),
    }


def differing_share(first: Array, second: Array) -> float:
    """Give the share of voxels in which two label maps differ.

    Args:
        first: Integers of any shape.
        second: Integers of the same shape.

    Returns:
        0 (the same) to 1.
    """
    return np.count_nonzero(first != second) / max(first.size, 1)


def describe_rules(
    tolerance_mm: float, penalty_mm: float | None, lesions: LesionRule | None = None
) -> JsonDict:
    """Say in words and numbers how the metrics were computed."""
    penalty = "the image's diagonal" if penalty_mm is None else f"{penalty_mm:g} mm"
    return {
        "hd95_mm": "95th percentile of the distances of both directions pooled (medpy)",
        "hd95_max_mm": "larger of the two directed 95th percentiles (MONAI)",
        "surface_dice": f"border voxels within {tolerance_mm:g} mm, counted",
        "both_empty": "Dice 1, HD95 0 mm, surface Dice 1",
        "one_empty": f"Dice 0, HD95 {penalty}, surface Dice 0; counted as penalised",
        "ci95": "percentile bootstrap of the mean over cases, 2000 resamples",
        "tolerance_mm": tolerance_mm,
        "penalty_mm": penalty_mm,
        **({} if lesions is None else {"lesion_wise": lesions.describe()}),
    }


def _check_options(tolerance_mm: float, penalty_mm: float | None) -> None:
    for name, value in (("tolerance", tolerance_mm), ("penalty", penalty_mm or 0.0)):
        if not 0 <= value < float("inf"):
            raise ConfigError(
                describe(f"bad {name}", expected="0 mm or more", found=f"{value} mm")
            )


def _scheme(labels: Path | str | LabelScheme) -> LabelScheme:
    return labels if isinstance(labels, LabelScheme) else load_label_scheme(labels)


def _check_values(prediction: Volume, scheme: LabelScheme) -> None:
    """Refuse integers without a meaning; a 3 for BraTS 2021's 4 would just score 0."""
    unknown = sorted({int(v) for v in np.unique(prediction.array)} - _known(scheme))
    if unknown:
        raise FormatError(
            describe(
                "a prediction holds integers that no label names",
                expected=", ".join(map(str, sorted(_known(scheme)))),
                found=", ".join(map(str, unknown)),
                file=prediction.path,
                remedy="Rewrite them, or name the labels in a dataset.json.",
            )
        )


def _known(scheme: LabelScheme) -> set[int]:
    return {0, *scheme.known_values, *scheme.regions_order}


def _mean_over_labels(summary: JsonDict) -> JsonDict:
    """Mean of the labels' means, for Dice, HD95 and surface Dice."""
    names = ("dice", "hd95_mm", "hd95_max_mm", "surface_dice", *LESION_METRICS)
    return {
        name: float(np.mean([row[name]["mean"] for row in summary.values()]))
        for name in names
        if summary and all(name in row for row in summary.values())
    }


def _without_margin(
    prediction: Array, reference: Array, margin: int
) -> tuple[Array, Array]:
    """Cut both to everything that isn't background, and `margin` voxels around it."""
    anything = (prediction != 0) | (reference != 0)
    if not anything.any():
        anything[(0,) * anything.ndim] = True
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side in metrics.bounding_box(anything)
    )
    return prediction[box], reference[box]


def _read_pair(pair: Pair) -> tuple[Volume, Volume]:
    found, truth = (_read_label_map(p) for p in (pair.prediction, pair.reference))
    difference = describe_grid_difference(
        truth.shape, truth.affine, found.shape, found.affine
    )
    if difference is not None:
        raise GeometryError(
            describe(
                "prediction and reference lie on different grids",
                expected=f"the grid of {pair.reference}",
                found=difference,
                file=pair.prediction,
                remedy="Resample one onto the other first.",
            )
        )
    return found, truth


def _read_label_map(path: Path) -> Volume:
    volume = read_volume(path, dtype=np.int32)
    if volume.array.shape[0] != 1:
        raise FormatError(
            describe(
                "a label map has several channels",
                expected="one",
                found=volume.array.shape[0],
                file=path,
            )
        )
    return volume


def _groups_found(
    pairs: tuple[Pair, ...], workers: int | None
) -> dict[str, tuple[int, ...]]:
    """Every integer but 0 that occurs in any label map, each as its own label."""

    def values(pair: Pair) -> set[int]:
        maps = (_read_label_map(p).array for p in (pair.prediction, pair.reference))
        return {int(value) for array in maps for value in np.unique(array)}

    found = set().union(*for_each_case(values, pairs, workers=workers))
    return {str(value): (value,) for value in sorted(found - {0})}
