"""Calibration against plain loops and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from segmamba.evaluation.calibration import (
    BINS,
    Reliability,
    describe_scores,
    rank_correlation,
    reliability_of_case,
)


def test_a_calibrated_model_has_no_error():
    random = np.random.default_rng(0)
    sure = random.uniform(0.3, 1, 400_000)
    found = Reliability()
    found.add(sure, random.random(sure.size) < sure)
    assert found.ece is not None
    assert found.ece < 0.005
    described = found.describe()
    assert described["mean_confidence"] == pytest.approx(0.65, abs=0.01)
    assert sum(row["voxels"] for row in described["bins"]) == sure.size


def test_a_boastful_model_has_the_gap_as_error():
    found = Reliability()
    found.add(np.full(1000, 0.95), np.arange(1000) < 700)
    assert found.ece == pytest.approx(0.25)
    assert found.describe()["bins"] == [
        {"voxels": 1000, "confidence": pytest.approx(0.95), "accuracy": 0.7}
    ]


def test_errors_of_bins_are_weighed_by_their_voxels():
    random = np.random.default_rng(1)
    sure, right = random.random(5000), random.random(5000) < 0.6
    found = Reliability()
    for part in np.array_split(np.arange(5000), 7):  # cases add up
        found.add(sure[part].astype(np.float32), right[part])
    expected = 0.0
    for low in range(BINS):
        inside = (sure * BINS).astype(int) == low
        expected += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert found.ece == pytest.approx(expected, rel=1e-4)


def test_certainty_is_in_the_last_bin_and_nothing_has_no_error():
    found = Reliability()
    assert found.ece is None
    assert found.describe()["accuracy"] is None
    found.add(np.ones(3), np.ones(3))
    assert found.voxels[-1] == 3
    assert found.ece == 0


def test_labelled_voxels_are_those_of_the_prediction():
    prediction = np.array([0, 0, 1, 1, 2])[:, None, None]
    reference = np.array([0, 1, 1, 0, 1])[:, None, None]
    sure = np.array([0.9, 0.8, 0.7, 0.6, 0.5])[:, None, None]
    found = reliability_of_case(prediction, reference, sure)
    assert found["labelled"].voxels.sum() == 3
    assert found["labelled"].right.sum() == 1
    assert found["all"].voxels.sum() == 5
    assert found["all"].right.sum() == 2


def test_ranks_agree_with_scipy():
    random = np.random.default_rng(2)
    dice = random.random(30)
    score = dice + random.normal(0, 0.3, 30)
    score[4] = np.nan
    found = rank_correlation(score, dice)
    expected = stats.spearmanr(np.delete(score, 4), np.delete(dice, 4))
    assert found["spearman"] == pytest.approx(expected[0])
    assert found["p"] == pytest.approx(expected[1])
    assert found["n"] == 29
    assert found["ci95"][0] < found["spearman"] < found["ci95"][1]
    exact = rank_correlation(dice**3, dice)
    assert exact["spearman"] == pytest.approx(1)
    assert exact["ci95"] == pytest.approx([1, 1])


@pytest.mark.parametrize("score", [[0.1, 0.2], [0.5, 0.5, 0.5], [np.nan] * 4])
def test_too_few_or_equal_cases_have_no_ranks(score):
    found = rank_correlation(np.array(score), np.arange(len(score)) / 5)
    assert found["spearman"] is None


def test_scores_are_paired_by_case_and_structure():
    dice = {"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.2}
    cases = {k: {"liver": {"dice": v}, "cyst": {"dice": 0.0}} for k, v in dice.items()}
    doubts = {
        name: {
            "expected_dice": value - 0.1,
            "mean_entropy": 1 - value,
            "structures": {
                "liver": structure(expected_dice=value, spread=1 - value),
                "cyst": structure(expected_dice=None, spread=None),
            },
        }
        for name, value in dice.items()
    }
    found = describe_scores(doubts, cases)
    assert found["cases"]["b"] == {
        "dice": 0.25,
        "expected_dice": 0.4,
        "mean_entropy": 0.5,
    }
    for key in ("expected_dice", "mean_entropy"):
        assert found[key]["spearman"] == pytest.approx(1)
        assert found["structures"]["liver"][key]["spearman"] == pytest.approx(1)
    gaps = [abs(v - 0.1 - v / 2) for v in dice.values()]
    assert found["dice_error"] == pytest.approx(np.mean(gaps))
    assert found["structures"]["liver"]["dice_error"] == pytest.approx(0)
    assert found["structures"]["liver"]["volume_spread"]["spearman"] > 0.99
    assert found["structures"]["cyst"]["expected_dice"]["n"] == 0
    assert found["structures"]["cyst"]["dice_error"] is None


def structure(expected_dice: float | None, spread: float | None) -> dict:
    return {
        "expected_dice": expected_dice,
        "mean_entropy": None if expected_dice is None else 1 - expected_dice,
        "sample_mean_ml": 2.0 if spread else 0.0,
        "sample_sd_ml": spread,
    }
