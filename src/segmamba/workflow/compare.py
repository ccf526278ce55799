"""Compare models by their scores on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segmamba.errors import ConfigError, describe
from segmamba.evaluation.compare import compare_scores
from segmamba.evaluation.compare_sources import load_scores
from segmamba.evaluation.summary import RESAMPLES, SEED
from segmamba.manifest import Session, write_manifest
from segmamba.report.comparison import write_comparison
from segmamba.report.comparison_cost import model_cost
from segmamba.types import JsonDict


def compare(
    runs: Sequence[Path | str],
    output: Path | str | None = None,
    *,
    names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> JsonDict:
    """Compare models case by case and write the report.

    Args:
        runs: Two or more: run folders (their folds are put together), folders of one
            fold, or `metrics.json` files.
        output: Folder for comparison.json, .md, .tex, .html and .png, and their
            manifest; None writes nothing.
        names: What to call the models; None takes the folders' names.
        metrics: Which to compare; None takes Dice, HD95 and surface Dice, and the
            lesion-wise ones where all models have them.
        labels: Which; None takes all.
        resamples: Bootstrap draws of intervals and rankings, at least 100.
        seed: Of all draws, 0 or more.

    Returns:
        What comparison.json holds: "models", "cases", "labels", "metrics", "summary",
        "pairs", "ranking", "cost", "method", "rules".

    Raises:
        ConfigError: Cases, labels or rules differ between the models; the text says
            how. Or an option is unknown.
        FormatError: There are no scores where they should be.
    """
    paths = [Path(run) for run in runs]
    _check_options(paths, names, resamples, seed)
    chosen = list(names) if names is not None else default_names(paths)
    options: JsonDict = {"metrics": metrics, "labels": labels}
    options |= {"resamples": resamples, "seed": seed}
    with Session("compare") as session:
        models = [load_scores(*item) for item in zip(paths, chosen, strict=True)]
        comparison = compare_scores(models, **options)
        comparison["cost"] = [
            {"model": model.name, **model_cost(model.files)} for model in models
        ]
        if output is not None:
            files = write_comparison(comparison, models, output)
            inputs = [file for model in models for file in model.files]
            write_manifest(
                files[0], session, {"names": chosen, **options}, inputs, files
            )
    return comparison


def default_names(paths: Sequence[Path]) -> list[str]:
    """Name models by as much of their paths as tells them apart.

    Args:
        paths: Of runs, folds or files; `metrics.json` itself says nothing.

    Returns:
        A different name for each, such as "light" or "light/fold_0".
    """
    parts = [_telling_parts(path) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, start=1)]


def _telling_parts(path: Path) -> tuple[str, ...]:
    path = path.resolve()
    if path.suffix == ".json":
        path = path.parent if path.name == "metrics.json" else path.with_suffix("")
    parts = path.parts[1:] or ("model",)
    if len(parts) > 1 and parts[-1].startswith("fold_"):
        return (*parts[:-2], "/".join(parts[-2:]))  # a fold alone names no model
    return parts


def _check_options(
    paths: Sequence[Path], names: Sequence[str] | None, resamples: int, seed: int
) -> None:
    if len(paths) < 2:
        raise ConfigError(
            describe("too few models to compare", expected="two", found=len(paths))
        )
    if names is not None and len(names) != len(paths):
        raise ConfigError(
            describe(
                "names don't fit the models",
                expected=f"{len(paths)} names",
                found=", ".join(names) or "none",
            )
        )
    if resamples < 100:
        raise ConfigError(
            describe("too few resamples", expected="100 or more", found=resamples)
        )
    if seed < 0:
        raise ConfigError(describe("bad seed", expected="0 or more", found=seed))
