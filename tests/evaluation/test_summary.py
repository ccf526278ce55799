"""Summaries of hand-made samples."""

from __future__ import annotations

import numpy as np
import pytest

from segmamba.evaluation.summary import bootstrap_interval, summarize_values


def test_mean_sd_and_median():
    row = summarize_values([1.0, 2.0, 6.0, float("nan")])
    assert row["mean"] == 3.0
    assert row["median"] == 2.0
    assert row["sd"] == pytest.approx(np.sqrt(7.0))
    assert row["n"] == 3


def test_small_samples_say_what_is_unknown():
    assert summarize_values([]) == {
        "mean": None,
        "sd": None,
        "median": None,
        "ci95": None,
        "n": 0,
    }
    one = summarize_values([0.5])
    assert one["sd"] is None
    assert one["ci95"] == [0.5, 0.5]


def test_interval_of_a_large_normal_sample_is_the_textbook_one():
    sample = np.random.default_rng(0).normal(10, 2, 400)
    low, high = bootstrap_interval(sample)
    half = 1.96 * sample.std(ddof=1) / np.sqrt(400)
    assert low == pytest.approx(sample.mean() - half, abs=0.03)
    assert high == pytest.approx(sample.mean() + half, abs=0.03)


def test_interval_of_two_cases_is_exact():
    """Of two cases the mean is low, middle or high: the ends are the cases."""
    assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)


def test_the_same_sample_gives_the_same_interval():
    sample = np.arange(7.0)
    assert bootstrap_interval(sample) == bootstrap_interval(sample)
    assert bootstrap_interval(sample, seed=1) != bootstrap_interval(sample, seed=2)
