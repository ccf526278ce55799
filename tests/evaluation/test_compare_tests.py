"""Paired tests, effect sizes and intervals against SciPy and against hand counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
from scipy import stats

from segmamba.evaluation.compare_tests import (
    cohen_dz,
    holm,
    paired_differences,
    permutation_p,
    rank_biserial,
    wilcoxon_p,
)
from segmamba.evaluation.summary import bootstrap_interval


def sample(n: int, *, digits: int = 9, shift: float = 0.3):
    return np.round(np.random.default_rng(n).normal(shift, 1, n), digits)


def test_permutation_by_hand():
    """Of the 8 signs of 1, 2, 3 the sums 6 and -6 alone reach 6."""
    assert permutation_p(np.array([1.0, 2.0, 3.0]), seed=0) == 2 / 8
    # Sums of 1, 2, -4: of +-1 +-2 +-4 those of size 1 or more: all but none.
    assert permutation_p(np.array([1.0, 2.0, -4.0]), seed=0) == 8 / 8
    # Sum of 1, -2, 4 is 3: -7, -5, -3, 3, 5, 7 reach it, -1 and 1 don't.
    assert permutation_p(np.array([1.0, -2.0, 4.0]), seed=0) == 6 / 8
    assert permutation_p(np.array([5.0]), seed=0) == 1.0


def test_permutation_counts_equal_sums_in_spite_of_rounding():
    """0.1 + 0.2 and 0.3 differ in the last bit; they are the same sum.

    The sum is 0.6; of the 8 signs that keep 0.6 itself, those reach it whose rest is
    0.6, 0.4, 0.2 or (twice) 0.
    """
    assert permutation_p(np.array([0.1, 0.2, -0.3, 0.6]), seed=0) == 10 / 16


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_exact_permutation_agrees_with_scipy(n):
    values = sample(n, digits=1)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert permutation_p(values, seed=0) == pytest.approx(expected.pvalue, rel=1e-12)


def test_drawn_permutation_agrees_with_the_exact_one():
    values = sample(20)
    exact = permutation_p(values, seed=0)
    padded = np.concatenate([values, [1e-7, -1e-7]])  # beyond what is enumerated
    drawn = permutation_p(padded, seed=0)
    assert 0.01 < exact < 0.5
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))
    assert drawn == permutation_p(padded, seed=0)
    assert drawn != permutation_p(padded, seed=1)


def test_a_drawn_p_is_never_zero():
    assert permutation_p(np.full(40, 1.0), seed=0) == 1 / 20_001


def test_zeros_change_no_permutation():
    values = np.array([1.0, -2.0, 4.0])
    with_zeros = np.concatenate([values, np.zeros(30)])
    assert permutation_p(with_zeros, seed=0) == 6 / 8


@pytest.mark.parametrize("n", [1, 3, 8, 25, 50, 51, 120])
def test_wilcoxon_without_ties_is_scipys(n):
    values = sample(n)
    expected = stats.wilcoxon(values).pvalue
    assert wilcoxon_p(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [6, 10, 13, 14, 30, 49, 51, 200])
@pytest.mark.parametrize("zeros", [0, 2])
def test_wilcoxon_with_ties_is_scipys(n, zeros):
    values = sample(n, digits=1)
    values[0] = values[1] = 0.7
    values[2 : 2 + zeros] = 0
    values[2 + zeros :][values[2 + zeros :] == 0] = 0.4
    if tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 15):
        pytest.skip("older versions of SciPy took another approximation")
    expected = stats.wilcoxon(values).pvalue
    assert wilcoxon_p(values) == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_by_hand():
    """Ranks 1 to 5, the smallest negative: W- = 1; 2 of 32 signs on each side."""
    assert wilcoxon_p(np.array([-1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(4 / 32)
    # All equal and positive: only two of 2^4 signs are as extreme.
    assert wilcoxon_p(np.full(4, 0.5)) == 2 / 16


@pytest.mark.parametrize("size", [0, 1, 5, 60])
def test_no_difference_at_all(size):
    nothing = np.zeros(size)
    assert wilcoxon_p(nothing) == 1.0
    assert permutation_p(nothing, seed=0) == 1.0
    assert rank_biserial(nothing) == (0.0 if size else None)
    assert cohen_dz(nothing) == (0.0 if size else None)


def test_noise_of_the_last_bit_is_a_tie():
    a = np.array([0.3, 0.5, 0.9])
    b = np.array([0.1 + 0.2, 0.5, 0.8])
    assert paired_differences(a, b).tolist() == [0.0, 0.0, 0.1]
    same = paired_differences(a + 0.1, a)
    assert np.unique(same).size == 1


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1 rise to 0.06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_counts_only_tests_that_were_made():
    assert holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])


def test_holm_keeps_the_rate_of_false_alarms():
    """Among 10 tests of nothing, one or more fall below 5 % in about 5 of 100."""
    p = np.random.default_rng(1).uniform(size=(4000, 10))
    alarms = np.mean([min(x for x in holm(list(row)) if x is not None) for row in p])
    assert alarms > 0.3
    rate = np.mean(
        [min(x for x in holm(list(row)) if x is not None) < 0.05 for row in p]
    )
    assert rate == pytest.approx(0.05, abs=0.012)


def test_effect_sizes_by_hand():
    values = np.array([1.0, 2.0, -3.0, 4.0, 0.0])
    assert rank_biserial(values) == pytest.approx((1 + 2 + 4 - 3) / 10)
    assert rank_biserial(-values) == -rank_biserial(values)
    assert rank_biserial(np.array([0.1, 0.2])) == 1.0
    assert cohen_dz(np.array([1.0, 3.0])) == pytest.approx(2 / np.sqrt(2))
    assert cohen_dz(np.array([2.0, 2.0])) is None
    assert cohen_dz(np.array([2.0])) is None


def test_tests_hold_their_level():
    """Under no difference p < 0.05 comes in at most about 5 of 100 samples."""
    random = np.random.default_rng(2)
    samples = random.normal(size=(600, 12))
    for test in (wilcoxon_p, lambda x: permutation_p(x, seed=0)):
        rate = np.mean([test(row) < 0.05 for row in samples])
        assert 0.025 < rate < 0.075


@pytest.mark.parametrize(
    ("n", "share"), [(5, 0.82), (10, 0.89), (30, 0.92), (100, 0.95)]
)
def test_intervals_cover_the_true_mean_as_often_as_the_docs_say(n, share):
    """Of a skewed distribution of known mean; few cases make them too narrow."""
    random = np.random.default_rng(3)
    inside = []
    for row in random.gamma(4.0, 1.0, (1000, n)):
        low, high = bootstrap_interval(row, resamples=500)
        inside.append(low <= 4.0 <= high)
    assert np.mean(inside) == pytest.approx(share, abs=0.025)
