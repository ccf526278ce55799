"""Rankings of models, and how stable they are under other draws of the cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy

from segmamba.evaluation.compare_tests import DECIMALS
from segmamba.types import Array, FloatArray, JsonDict


def rank_models(
    costs: FloatArray, names: Sequence[str], *, resamples: int, seed: int
) -> JsonDict:
    """Rank models by their mean over cases, and again for bootstrap draws of cases.

    Args:
        costs: (cases, models), lower is better, without NaN; at least one case.
        names: Of the models.
        resamples: Bootstrap draws.
        seed: Of the draws.

    Returns:
        "models": best first, each {"model", "mean", "position" (1 is best; equals
        share the better one), "position_ci95", "share_of_positions" (how often it took
        each position)}; "kendall_tau": mean agreement of the draws' order with that of
        all cases, 1 if it never changes.

    Source:
        Wiesenfarth et al., Methods and open-source toolkit for analyzing and
        visualizing challenge results, Scientific Reports 2021 (challengeR).
    """
    means = np.round(costs.mean(axis=0), DECIMALS)
    drawn = np.round(_bootstrap_means(costs, resamples, seed), DECIMALS)
    place = scipy.stats.rankdata(means, method="min").astype(int)
    places = scipy.stats.rankdata(drawn, method="min", axis=1).astype(int)
    rows = [
        {
            "model": name,
            "mean": float(means[index]),
            "position": int(place[index]),
            "position_ci95": _interval(places[:, index]),
            "share_of_positions": _shares(places[:, index], len(names)),
        }
        for index, name in enumerate(names)
    ]
    rows.sort(key=lambda row: row["position"])
    return {"models": rows, "kendall_tau": float(_agreement(means, drawn).mean())}


def case_ranks(values: FloatArray, higher_is_better: bool) -> FloatArray:
    """Rank the models in each case, 1 for the best; equals share the mean rank.

    Args:
        values: (cases, models) without NaN.
        higher_is_better: Which way the metric points.

    Returns:
        (cases, models).
    """
    rounded = np.round(values, DECIMALS)
    return scipy.stats.rankdata(-rounded if higher_is_better else rounded, axis=1)


def _bootstrap_means(costs: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Means (resamples, models) over cases drawn with replacement."""
    n = len(costs)
    random = np.random.default_rng(seed)
    weights = random.multinomial(n, np.full(n, 1 / n), resamples)
    return weights @ costs / n


def _interval(places: Array) -> list[int]:
    ends = np.percentile(places, [2.5, 97.5], method="nearest")
    return [int(end) for end in ends]


def _shares(places: Array, count: int) -> list[float]:
    return [float(np.mean(places == place)) for place in range(1, count + 1)]


def _agreement(means: FloatArray, drawn: FloatArray) -> FloatArray:
    """Kendall's tau (resamples,) of each draw with all cases.

    A pair of models counts 1 if it stands in the same order (or is equal in both), -1
    if in the opposite one, 0 if it is equal in just one of the two.
    """
    first, second = np.triu_indices(len(means), k=1)
    whole = np.sign(means[first] - means[second])
    parts = np.sign(drawn[:, first] - drawn[:, second])
    same = np.where(whole == 0, (parts == 0).astype(float), parts * whole)
    return same.mean(axis=1)
