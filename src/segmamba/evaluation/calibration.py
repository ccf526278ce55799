"""How well a model's doubt tells of its errors: calibration, and ranks of cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy

from segmamba.evaluation.summary import RESAMPLES, SEED
from segmamba.types import Array, FloatArray, JsonDict

BINS = 15
"""Bins of confidence. Source: Guo et al., On Calibration of Modern Neural Networks,
ICML 2017 (arXiv 1706.04599)."""

AREAS = ("labelled", "all")
"""Voxels that count: those to which the prediction gives a label, or all there are.
Those of the reference too would be chosen errors: any model would look boastful."""


@dataclass
class Reliability:
    """Confidence against what was right, over the voxels of all cases; adds up."""

    voxels: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    """(BINS,): how many have a confidence in this bin."""
    confidence: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    """(BINS,): sum of their confidence."""
    right: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    """(BINS,): how many have the reference's label."""

    def add(self, confidence: Array, right: Array) -> None:
        """Add voxels.

        Args:
            confidence: (n,), 0 to 1: probability of the label that was given.
            right: (n,), whether it is the reference's.
        """
        values = confidence.astype(np.float64)
        index = np.clip((values * BINS).astype(np.int64), 0, BINS - 1)
        self.voxels += np.bincount(index, minlength=BINS)
        self.confidence += np.bincount(index, values, minlength=BINS)
        self.right += np.bincount(index, right.astype(np.float64), minlength=BINS)

    @property
    def ece(self) -> float | None:
        """Expected calibration error; None without voxels.

        It is the mean over voxels of the gap between their bin's mean confidence and
        its share of right voxels.
        """
        total = self.voxels.sum()
        if total == 0:
            return None
        return float(np.abs(self.right - self.confidence).sum() / total)

    def describe(self) -> JsonDict:
        """Give "ece", "voxels", "confidence" and "accuracy", the last two by bin."""
        filled = self.voxels > 0
        count = np.where(filled, self.voxels, 1)
        return {
            "ece": self.ece,
            "mean_confidence": _ratio(self.confidence.sum(), self.voxels.sum()),
            "accuracy": _ratio(self.right.sum(), self.voxels.sum()),
            "bins": [
                {
                    "voxels": int(self.voxels[index]),
                    "confidence": float(self.confidence[index] / count[index]),
                    "accuracy": float(self.right[index] / count[index]),
                }
                for index in np.flatnonzero(filled)
            ],
        }


def reliability_of_case(
    prediction: Array, reference: Array, confidence: Array
) -> dict[str, Reliability]:
    """Count a case's voxels by their confidence.

    Args:
        prediction: (I, J, K) integers.
        reference: (I, J, K) integers.
        confidence: (I, J, K), 0 to 1.

    Returns:
        One for each of `AREAS`.
    """
    right, labelled = prediction == reference, prediction != 0
    found = {area: Reliability() for area in AREAS}
    found["labelled"].add(confidence[labelled], right[labelled])
    found["all"].add(confidence.ravel(), right.ravel())
    return found


def rank_correlation(score: FloatArray, dice: FloatArray) -> JsonDict:
    """Say how well a score puts cases in the order of their Dice.

    Args:
        score: (n,) one number a case, higher for better; NaN counts as absent.
        dice: (n,) of the same cases.

    Returns:
        "spearman" with its 95 % bootstrap interval "ci95" over cases and its p-value
        "p" (two-sided), of "n" cases; None where it is undefined.

    Source:
        Spearman, The proof and measurement of association between two things, 1904.
    """
    known = ~(np.isnan(score) | np.isnan(dice))
    score, dice = score[known], dice[known]
    n = len(score)
    if n < 3 or np.ptp(score) == 0 or np.ptp(dice) == 0:
        return {"spearman": None, "ci95": None, "p": None, "n": n}
    found: Any = scipy.stats.spearmanr(score, dice)
    draws = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    low, high = np.nanpercentile(_spearman(score[draws], dice[draws]), [2.5, 97.5])
    return {
        "spearman": float(found[0]),
        "ci95": [float(low), float(high)],
        "p": float(found[1]),
        "n": n,
    }


def describe_scores(
    doubts: Mapping[str, JsonDict], cases: Mapping[str, Mapping[str, JsonDict]]
) -> JsonDict:
    """Compare what predictions say of themselves with their scores.

    Args:
        doubts: Case to "uncertainty" of its manifest.
        cases: Case to label to scores, as `evaluate_case` gives them.

    Returns:
        "cases": for each its "dice" (mean over labels), "expected_dice" and
        "mean_entropy"; "expected_dice" and "mean_entropy": their rank correlation with
        Dice, of entropy with its sign turned; "dice_error": mean absolute difference of
        Dice from what was expected; "structures": the same for each label, and the
        rank correlation of its relative spread of volumes, sign turned.
    """
    names = sorted(doubts)
    labels = list(dict.fromkeys(label for name in names for label in cases[name]))
    rows = {
        name: {
            "dice": float(np.mean([row["dice"] for row in cases[name].values()])),
            "expected_dice": doubts[name]["expected_dice"],
            "mean_entropy": doubts[name]["mean_entropy"],
        }
        for name in names
    }
    dice = _column(rows.values(), "dice")
    expected = _column(rows.values(), "expected_dice")
    return {
        "cases": rows,
        "expected_dice": rank_correlation(expected, dice),
        "mean_entropy": rank_correlation(-_column(rows.values(), "mean_entropy"), dice),
        "dice_error": _mean_gap(expected, dice),
        "structures": {label: _structure(label, doubts, cases) for label in labels},
    }


def _structure(
    label: str,
    doubts: Mapping[str, JsonDict],
    cases: Mapping[str, Mapping[str, JsonDict]],
) -> JsonDict:
    names = [n for n in sorted(doubts) if label in doubts[n]["structures"]]
    names = [name for name in names if label in cases[name]]
    rows = [doubts[name]["structures"][label] for name in names]
    dice = np.array([cases[name][label]["dice"] for name in names], np.float64)
    expected = _column(rows, "expected_dice")
    deviation, mean = _column(rows, "sample_sd_ml"), _column(rows, "sample_mean_ml")
    spread = deviation / np.where(mean > 0, mean, np.nan)
    return {
        "expected_dice": rank_correlation(expected, dice),
        "mean_entropy": rank_correlation(-_column(rows, "mean_entropy"), dice),
        "volume_spread": rank_correlation(-spread, dice),
        "dice_error": _mean_gap(expected, dice),
    }


def _column(rows: Iterable[JsonDict], key: str) -> FloatArray:
    values = [row[key] for row in rows]
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _mean_gap(expected: FloatArray, found: FloatArray) -> float | None:
    gaps = np.abs(expected - found)
    return float(np.nanmean(gaps)) if np.isfinite(gaps).any() else None


def _spearman(first: Array, second: Array) -> FloatArray:
    """Rank correlation of each row (draws, n); NaN where a row is constant."""
    ranks = [scipy.stats.rankdata(rows, axis=1) for rows in (first, second)]
    a, b = (rows - rows.mean(axis=1, keepdims=True) for rows in ranks)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return (a * b).sum(axis=1) / np.where(norm > 0, norm, np.nan)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
