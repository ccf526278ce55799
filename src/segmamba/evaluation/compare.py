"""Models against each other, case by case: differences, tests, effects, ranking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from segmamba.errors import ConfigError, describe
from segmamba.evaluation.compare_ranking import case_ranks, rank_models
from segmamba.evaluation.compare_sources import Scores, check_comparable
from segmamba.evaluation.compare_tests import (
    EXACT_SIGNS,
    SIGN_DRAWS,
    cohen_dz,
    holm,
    paired_differences,
    permutation_p,
    rank_biserial,
    wilcoxon_p,
)
from segmamba.evaluation.summary import (
    RESAMPLES,
    SEED,
    bootstrap_interval,
    summarize_values,
)
from segmamba.types import FloatArray, JsonDict

HIGHER_IS_BETTER = {
    "dice": True,
    "hd95_mm": False,
    "hd95_max_mm": False,
    "surface_dice": True,
    "lesion_dice": True,
    "lesion_hd95_mm": False,
}
"""Metrics that can be compared, and which way they point."""

DEFAULT_METRICS = ("dice", "hd95_mm", "surface_dice", "lesion_dice", "lesion_hd95_mm")
"""Those of them that are compared, where all models have them."""


def compare_scores(
    models: Sequence[Scores],
    *,
    metrics: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> JsonDict:
    """Compare models on the same cases.

    Differences are a - b, whichever way the metric points. A case whose value is
    undefined (null) for one model is left out for all, in that label and metric.

    Args:
        models: Two or more.
        metrics: Names from `HIGHER_IS_BETTER`; None takes Dice, HD95, surface Dice and
            the lesion-wise ones, as far as all models have them.
        labels: None takes all.
        resamples: Bootstrap draws of intervals and rankings.
        seed: Of all draws.

    Returns:
        {"models", "cases", "labels", "metrics", "summary", "pairs", "ranking",
        "method", "rules"}, ready for JSON.

    Raises:
        ConfigError: The models can't be paired, or an option is unknown.
    """
    _require_two(models)
    check_comparable(models)
    chosen = _choose_metrics(models, metrics)
    names = _choose_labels(models[0].labels, labels)
    values = score_arrays(models, names, chosen)
    return {
        "models": [_describe_model(model) for model in models],
        "cases": sorted(models[0].cases),
        "labels": names,
        "metrics": [
            {"name": m, "higher_is_better": HIGHER_IS_BETTER[m]} for m in chosen
        ],
        "summary": _summaries(models, values),
        "pairs": _pairs([m.name for m in models], values, resamples, seed),
        "ranking": _rankings([m.name for m in models], values, resamples, seed),
        "method": _describe_method(resamples, seed),
        "rules": models[0].rules,
    }


def score_arrays(
    models: Sequence[Scores], labels: Sequence[str], metrics: Sequence[str]
) -> dict[tuple[str, str], FloatArray]:
    """Arrange scores for pairing.

    Args:
        models: Scored on the same cases and labels.
        labels: Which to take.
        metrics: Which to take.

    Returns:
        (label, metric) to (cases, models), cases sorted by id; a case whose value is
        undefined for one model is NaN for all.

    Raises:
        ConfigError: A score is neither a number nor null.
    """
    cases = sorted(models[0].cases)
    return {
        (label, metric): _values(models, cases, label, metric)
        for label in labels
        for metric in metrics
    }


def compare_pair(
    a: FloatArray, b: FloatArray, *, higher_is_better: bool, resamples: int, seed: int
) -> JsonDict:
    """Compare two models in one label and metric.

    Args:
        a: (cases,) values of the first; NaN where undefined.
        b: (cases,) of the second.
        higher_is_better: Which way the metric points.
        resamples: Bootstrap draws of the interval.
        seed: Of all draws.

    Returns:
        The numbers of one row of "pairs", before Holm's correction.
    """
    defined = ~(np.isnan(a) | np.isnan(b))
    difference = paired_differences(a[defined], b[defined])
    gain = difference if higher_is_better else -difference
    if difference.size == 0:
        measured: JsonDict = dict.fromkeys(
            ("mean_difference", "ci95", "p_wilcoxon", "p_permutation")
        )
    else:
        interval = bootstrap_interval(difference, resamples=resamples, seed=seed)
        measured = {
            "mean_difference": float(difference.mean()),
            "ci95": list(interval),
            "p_wilcoxon": wilcoxon_p(difference),
            "p_permutation": permutation_p(difference, seed=seed),
        }
    return {
        "n": int(difference.size),
        "left_out": int(np.count_nonzero(~defined)),
        **measured,
        "rank_biserial": rank_biserial(difference),
        "cohen_dz": cohen_dz(difference),
        "wins": int(np.count_nonzero(gain > 0)),
        "ties": int(np.count_nonzero(gain == 0)),
        "losses": int(np.count_nonzero(gain < 0)),
    }


def _require_two(models: Sequence[Scores]) -> None:
    names = [model.name for model in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            describe(
                "bad models to compare",
                expected="two or more, each with a name of its own",
                found=", ".join(names) or "none",
            )
        )


def _choose_metrics(
    models: Sequence[Scores], wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """Take those that every model has for every case and label."""
    rows = [row for m in models for case in m.cases.values() for row in case.values()]
    there = [name for name in HIGHER_IS_BETTER if all(name in row for row in rows)]
    chosen = (
        tuple(name for name in DEFAULT_METRICS if name in there)
        if wanted is None
        else tuple(dict.fromkeys(wanted))
    )
    missing = [name for name in chosen if name not in there]
    if missing or not chosen:
        raise ConfigError(
            describe(
                "no such metric in all models",
                expected=f"some of {', '.join(there or HIGHER_IS_BETTER)}",
                found=", ".join(missing) or "none",
                remedy="Lesion-wise ones come from 'segmamba evaluate --lesion-wise'.",
            )
        )
    return chosen


def _choose_labels(there: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    chosen = list(there if wanted is None else dict.fromkeys(wanted))
    missing = [name for name in chosen if name not in there]
    if missing or not chosen:
        raise ConfigError(
            describe(
                "no such label",
                expected=f"some of {', '.join(there)}",
                found=", ".join(missing) or "none",
            )
        )
    return chosen


def _values(
    models: Sequence[Scores], cases: Sequence[str], label: str, metric: str
) -> FloatArray:
    """(cases, models); NaN in the whole row where any model's value is undefined."""
    values = np.array(
        [
            [_number(model.cases[case][label][metric], model, case) for model in models]
            for case in cases
        ]
    )
    values[np.isnan(values).any(axis=1)] = np.nan
    return values


def _number(value: Any, model: Scores, case: str) -> float:
    if value is None:
        return np.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if np.isfinite(value) else np.nan
    raise ConfigError(
        describe(
            f"a score of case {case} is no number",
            expected="a number or null",
            found=repr(value),
            file=model.files[0],
        )
    )


def _describe_model(model: Scores) -> JsonDict:
    return {
        "name": model.name,
        "files": [str(file) for file in model.files],
        "cases": len(model.cases),
    }


def _summaries(
    models: Sequence[Scores], values: dict[tuple[str, str], FloatArray]
) -> list[JsonDict]:
    rows = []
    for (label, metric), table in values.items():
        for index, model in enumerate(models):
            row = {
                "model": model.name,
                "label": label,
                "metric": metric,
                **summarize_values(table[:, index].tolist()),
                "left_out": int(np.isnan(table[:, index]).sum()),
                **_count_empty(model, label),
            }
            rows.append(row)
    return rows


def _count_empty(model: Scores, label: str) -> JsonDict:
    """Count the cases whose value is a rule of empty masks, not a measurement."""
    flags = [
        [bool(case[label].get(f"empty_{what}")) for what in ("reference", "prediction")]
        for case in model.cases.values()
    ]
    return {
        "both_empty": sum(a and b for a, b in flags),
        "penalised": sum(a != b for a, b in flags),
    }


def _pairs(
    names: Sequence[str],
    values: dict[tuple[str, str], FloatArray],
    resamples: int,
    seed: int,
) -> list[JsonDict]:
    rows: list[JsonDict] = [
        {"a": names[a], "b": names[b], "label": label, "metric": metric}
        | compare_pair(
            table[:, a],
            table[:, b],
            higher_is_better=HIGHER_IS_BETTER[metric],
            resamples=resamples,
            seed=seed,
        )
        for (label, metric), table in values.items()
        for a, b in itertools.combinations(range(len(names)), 2)
    ]
    for source, target in (
        ("p_wilcoxon", "p_holm"),
        ("p_permutation", "p_permutation_holm"),
    ):
        corrected = holm([row[source] for row in rows])
        for row, p in zip(rows, corrected, strict=True):
            row[target] = p
    return rows


def _rankings(
    names: Sequence[str],
    values: dict[tuple[str, str], FloatArray],
    resamples: int,
    seed: int,
) -> JsonDict:
    """Rank by the mean rank over everything, and by the mean of each metric."""
    single, ranks = [], []
    for (label, metric), table in values.items():
        higher = HIGHER_IS_BETTER[metric]
        defined = ~np.isnan(table).any(axis=1)
        place = np.full(table.shape, np.nan)
        if defined.any():
            costs = -table[defined] if higher else table[defined]
            ranked = rank_models(costs, names, resamples=resamples, seed=seed)
            for row in ranked["models"]:
                row["mean"] = 0.0 - row["mean"] if higher else row["mean"]
            single.append({"label": label, "metric": metric, **ranked})
            place[defined] = case_ranks(table[defined], higher)
        ranks.append(place)
    return {
        "overall": _overall(np.stack(ranks), names, resamples, seed),
        "by_metric": single,
    }


def _overall(
    ranks: FloatArray, names: Sequence[str], resamples: int, seed: int
) -> JsonDict | None:
    """Rank by the mean of `ranks` (tables, cases, models); None without any case."""
    known = ~np.isnan(ranks)
    count = known.sum(axis=0)
    usable = count.min(axis=1) > 0
    if not usable.any():
        return None
    total = np.where(known, ranks, 0.0).sum(axis=0)
    return rank_models(
        total[usable] / count[usable], names, resamples=resamples, seed=seed
    )


def _describe_method(resamples: int, seed: int) -> JsonDict:
    return {
        "difference": "a - b, also where lower is better",
        "ci95": f"percentile bootstrap of the mean over cases, {resamples} resamples",
        "p_wilcoxon": "Wilcoxon's signed-rank test, two-sided, zeros dropped",
        "p_permutation": "exchange of the models case by case (mean difference, "
        f"two-sided): exact up to {EXACT_SIGNS} cases that differ, else "
        f"{SIGN_DRAWS} draws",
        "p_holm": "Holm's correction of p_wilcoxon over all pairs, labels and metrics "
        "here; p_permutation_holm that of p_permutation",
        "rank_biserial": "(positive - negative ranks) / all ranks of the differences",
        "cohen_dz": "mean difference / standard deviation of the differences",
        "wins": "cases in which a is better than b; ties agree to 12 decimals",
        "undefined": "a value that is null for one model leaves its case out for all, "
        "in that label and metric: left_out",
        "ranking": "overall: mean rank over cases, labels and metrics; by_metric: mean "
        f"value; {resamples} bootstrap draws of the cases",
        "seed": seed,
    }
