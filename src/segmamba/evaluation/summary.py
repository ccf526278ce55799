"""Many cases in a few numbers: mean, spread, median and a bootstrap interval."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from segmamba.types import Array, FloatArray, JsonDict

METRICS = (
    "dice",
    "hd95_mm",
    "hd95_max_mm",
    "surface_dice",
    "volume_ml",
    "reference_volume_ml",
    "volume_error_ml",
)
"""Numbers of each case and label that are summarised."""

LESION_METRICS = ("lesion_dice", "lesion_hd95_mm")
"""Numbers that are summarised where lesions were scored."""

LESION_COUNTS = (
    "lesions_found",
    "lesions_missed",
    "lesions_false",
    "lesions_ignored",
)
"""Numbers that are added up where lesions were scored."""

RESAMPLES = 2000
SEED = 12345


def summarize_values(values: Sequence[float]) -> JsonDict:
    """Describe a sample.

    Args:
        values: One number a case; NaN counts as absent.

    Returns:
        {"mean", "sd", "median", "ci95": [low, high], "n"}; sd divides by n - 1 and is
        None for a single case; all but n are None for no case.
    """
    sample = np.asarray(values, np.float64)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return {"mean": None, "sd": None, "median": None, "ci95": None, "n": 0}
    low, high = bootstrap_interval(sample)
    return {
        "mean": float(sample.mean()),
        "sd": float(sample.std(ddof=1)) if sample.size > 1 else None,
        "median": float(np.median(sample)),
        "ci95": [low, high],
        "n": int(sample.size),
    }


def bootstrap_interval(
    sample: FloatArray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """Give a 95 % percentile bootstrap interval of the mean.

    Args:
        sample: (n,) at least one number.
        resamples: How often to draw n cases with replacement.
        seed: Of the draws; the same seed gives the same interval.

    Returns:
        Low and high end; both are the number itself if there is just one.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    draws = _draws(len(sample), resamples, seed)
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize_cases(cases: Mapping[str, Mapping[str, JsonDict]]) -> JsonDict:
    """Summarise what `evaluate_case` gave for many cases.

    Args:
        cases: Case id to label to numbers.

    Returns:
        Label to {metric: sample description} and the counts `cases`,
        `empty_reference`, `empty_prediction`, `both_empty` and `penalised`; with
        lesions, also their counts over all cases.
    """
    labels = list(dict.fromkeys(label for case in cases.values() for label in case))
    return {
        label: _summarize_label([case[label] for case in cases.values()])
        for label in labels
    }


def _summarize_label(rows: Sequence[JsonDict]) -> JsonDict:
    with_lesions = all(metric in row for row in rows for metric in LESION_METRICS)
    names = (*METRICS, *LESION_METRICS) if with_lesions else METRICS
    summary: JsonDict = {
        metric: summarize_values([row[metric] for row in rows]) for metric in names
    }
    for count in LESION_COUNTS if with_lesions else ():
        summary[count] = sum(row[count] for row in rows)
    empty_reference = [row["empty_reference"] for row in rows]
    empty_prediction = [row["empty_prediction"] for row in rows]
    pairs = list(zip(empty_reference, empty_prediction, strict=True))
    summary["cases"] = len(rows)
    summary["empty_reference"] = sum(empty_reference)
    summary["empty_prediction"] = sum(empty_prediction)
    summary["both_empty"] = sum(a and b for a, b in pairs)
    summary["penalised"] = sum(a != b for a, b in pairs)
    return summary


@functools.lru_cache(maxsize=4)
def _draws(n: int, resamples: int, seed: int) -> Array:
    """Indices (resamples, n); the same for every metric of the same cases."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))
