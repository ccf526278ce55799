"""Tests and effect sizes of paired differences, one number a case.

All take differences that were rounded by `paired_differences`, so that a tie is a tie
and not the noise of the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import scipy

from segmamba.types import Array, FloatArray

DECIMALS = 12
"""Digits of a difference; what is smaller is noise of the arithmetic."""

EXACT_SIGNS = 20
"""Differences up to which all 2^n signs are enumerated."""

SIGN_DRAWS = 20_000
"""Random signs for more differences than that; the smallest p is one in as many."""

_TIED_RANKS = 13
_UNTIED_RANKS = 50
_CHUNK = 1000


def paired_differences(a: FloatArray, b: FloatArray) -> FloatArray:
    """Subtract case by case, a - b, to 12 decimals.

    Args:
        a: (n,) values of one model.
        b: (n,) values of the other, of the same cases in the same order.

    Returns:
        (n,) differences.
    """
    return np.round(np.asarray(a, np.float64) - np.asarray(b, np.float64), DECIMALS)


def wilcoxon_p(differences: FloatArray) -> float:
    """Test by ranks whether differences are symmetric about zero, two-sided.

    Zeros are dropped. The same choices as SciPy's own, in any of its versions: exact
    for up to 50 differences without ties or zeros, by all signs of the ranks for up
    to 13 with them, and else the normal approximation with its correction for ties.

    Args:
        differences: (n,) from `paired_differences`.

    Returns:
        p, 0 to 1; 1 if all differences are zero or there are none.

    Source:
        Wilcoxon, Individual comparisons by ranking methods, Biometrics 1945.
    """
    kept = differences[differences != 0]
    if kept.size == 0:
        return 1.0
    ranks = scipy.stats.rankdata(np.abs(kept))
    is_plain = kept.size == differences.size == np.unique(ranks).size
    if is_plain and kept.size <= _UNTIED_RANKS:
        return float(cast(Any, scipy.stats.wilcoxon(kept, method="exact")).pvalue)
    signed = np.sign(kept) * ranks
    if not is_plain and differences.size <= _TIED_RANKS:
        return _exact_sign_p(signed)
    return _normal_rank_p(signed)


def _normal_rank_p(signed_ranks: FloatArray) -> float:
    """Two-sided p of a sum of signed ranks, as if it were normal.

    Its variance is the sum of the squared ranks; mid-ranks correct it for ties.
    """
    z = abs(signed_ranks.sum()) / np.sqrt((signed_ranks**2).sum())
    return float(2 * scipy.stats.norm.sf(z))


def permutation_p(
    differences: FloatArray, *, seed: int, draws: int = SIGN_DRAWS
) -> float:
    """Test by exchanging the models case by case whether the mean is zero, two-sided.

    Exact up to 20 differences that aren't zero (a zero has no sign to change). Beyond,
    random signs are drawn, the observed ones counted among them.

    Args:
        differences: (n,) from `paired_differences`.
        seed: Of the draws.
        draws: How many.

    Returns:
        p, above 0 to 1; 1 if all differences are zero or there are none.

    Source:
        Fisher, The Design of Experiments, 1935; for the draws Phipson and Smyth,
        Permutation p-values should never be zero, 2010.
    """
    kept = differences[differences != 0]
    if kept.size == 0:
        return 1.0
    if kept.size <= EXACT_SIGNS:
        return _exact_sign_p(kept)
    observed = abs(kept.sum())
    signs = _random_signs(kept.size, draws, seed)
    sums = np.concatenate(
        [signs[i : i + _CHUNK] @ kept for i in range(0, len(signs), _CHUNK)]
    )
    reached = np.count_nonzero(_reaches(sums, observed))
    return float((reached + 1) / (len(sums) + 1))


def _exact_sign_p(values: FloatArray) -> float:
    """Share of all signs whose sum is as far from zero as the observed one."""
    sums = np.array([values[0]])  # its other sign mirrors everything
    for value in np.abs(values[1:]):
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(_reaches(sums, abs(values.sum()))))


def _reaches(sums: FloatArray, observed: float) -> Array:
    """Compare with room for rounding; to miss an equal sum would make p too small."""
    return np.abs(sums) >= observed - 1e-9 * max(1.0, observed)


@functools.lru_cache(maxsize=2)
def _random_signs(n: int, draws: int, seed: int) -> Array:
    """Signs (draws, n) of -1 and 1; the same for every test of as many cases."""
    bits = np.random.default_rng(seed).integers(0, 2, (draws, n), dtype=np.int8)
    return bits * np.int8(2) - np.int8(1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values so that any false alarm among all tests stays improbable.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may fall
    below the one before, nor exceed 1.

    Args:
        p_values: Of all tests that were made; None for one that could not be made.

    Returns:
        Corrected, in the same order.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    made = [(p, index) for index, p in enumerate(p_values) if p is not None]
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, index) in enumerate(sorted(made)):
        largest = max(largest, min(1.0, p * (len(made) - place)))
        corrected[index] = largest
    return corrected


def rank_biserial(differences: FloatArray) -> float | None:
    """Weigh gains against losses by their ranks.

    Args:
        differences: (n,) from `paired_differences`.

    Returns:
        (sum of positive ranks - sum of negative ranks) / their sum: -1 to 1, 0 if all
        differences are zero; None for no case.

    Source:
        Kerby, The simple difference formula, 2014 (matched pairs).
    """
    if differences.size == 0:
        return None
    kept = differences[differences != 0]
    if kept.size == 0:
        return 0.0
    ranks = scipy.stats.rankdata(np.abs(kept))
    return float((np.sign(kept) * ranks).sum() / ranks.sum())


def cohen_dz(differences: FloatArray) -> float | None:
    """Divide the mean difference by the standard deviation of the differences.

    Args:
        differences: (n,) from `paired_differences`.

    Returns:
        Cohen's d_z; 0 if all differences are zero; None where it isn't defined: one
        case, or differences that are all the same.

    Source:
        Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988.
    """
    if differences.size and not differences.any():
        return 0.0
    if differences.size < 2 or np.ptp(differences) == 0:
        return None
    return float(differences.mean() / differences.std(ddof=1))
