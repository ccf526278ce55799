"""All folds one after another, their scores together, and post-processing from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from segmamba import atomic
from segmamba.data.splits import Split, load_splits
from segmamba.errors import ConfigError, describe
from segmamba.evaluation.summary import summarize_cases
from segmamba.inference.postprocessing import Postprocessing
from segmamba.types import JsonDict
from segmamba.workflow.fold import FoldTraining
from segmamba.workflow.folder import Progress, RunFolder, RunSettings
from segmamba.workflow.postprocess import (
    held_out_cases,
    load_run_dataset,
    postprocess,
    scores_after,
)
from segmamba.workflow.train import SplitScheme, fold_training

_MEAN_OF = ("dice", "hd95_mm", "hd95_max_mm", "surface_dice")


@dataclass(frozen=True)
class CrossValidation:
    """What training all folds left."""

    folder: Path
    """The run."""
    seconds: float
    """Time of training, resumed parts too; folds finished before count nothing."""
    scores: JsonDict
    """What cross_validation.json holds."""
    postprocessing: Postprocessing
    """What postprocessing.json holds."""


def cross_validate(
    data: Path | str,
    run: Path | str,
    *,
    preset: str | None = None,
    max_time_s: float | None = None,
    max_epochs: int | None = None,
    device: str = "auto",
    config: Path | str | RunSettings | None = None,
    splits_file: Path | str | None = None,
    split: SplitScheme = "5-fold",
    seed: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> CrossValidation:
    """Train every fold, sum up their scores, and decide the post-processing.

    Folds that are finished with the same settings are skipped and an interrupted one
    goes on. Writes `cross_validation.json` and `postprocessing.json` into the run.

    Args:
        data: A folder in a known layout, or a CSV file.
        run: The run folder; made if it is missing.
        preset: The network; None takes the plan's, or the device's default.
        max_time_s: Seconds to train each fold.
        max_epochs: Epochs to train each fold; 1000 if neither is given.
        device: "auto", "cpu", "cuda" ...
        config: YAML file of settings, or the settings.
        splits_file: Splits of one's own; None keeps the run's or draws them.
        split: Which splits to draw.
        seed: Of weights, patches and augmentation.
        progress: Called with steps done, all steps, what is being done, and a note.
        say: Called with a line of text at each stage.

    Returns:
        Scores over all folds, and the post-processing.

    Raises:
        FormatError: The data set has errors.
        ConfigError: A setting, the plan or the splits are unusable, there is a single
            fold only, or a fold was trained with other settings.
        TrainingError: Not-a-number, or an interruption; what is trained is kept.
    """
    say = say or (lambda text: None)

    def job(fold: int) -> FoldTraining:
        return fold_training(
            data,
            run,
            preset=preset,
            fold=fold,
            max_time_s=max_time_s,
            max_epochs=max_epochs,
            device=device,
            config=config,
            splits_file=splits_file,
            split=split,
            seed=seed,
            progress=progress,
        )

    folder = RunFolder(Path(run))
    job(0)  # settings, plan and splits are there, and sound, before anything trains
    splits = load_splits(folder.splits)
    _require_folds(splits, folder)
    seconds = sum(
        _train_fold(job(fold), len(splits), say) for fold in range(len(splits))
    )
    postprocessing = postprocess(run, progress=progress)
    scores = _scores(folder, postprocessing, progress)
    atomic.write_json(folder.cross_validation, scores)
    return CrossValidation(folder.root, seconds, scores, postprocessing)


def _require_folds(splits: list[Split], folder: RunFolder) -> None:
    lacking = [str(i) for i, members in enumerate(splits) if not members["val"]]
    if len(splits) > 1 and not lacking:
        return
    raise ConfigError(
        describe(
            "these splits give no cross-validation",
            expected="two folds or more, each with cases held out",
            found=f"no case held out in fold {', '.join(lacking)}"
            if lacking
            else "one fold",
            file=folder.splits,
            remedy="Leave out --cross-validate; 'segmamba postprocess RUN' decides the "
            "post-processing from what one fold holds out.",
        )
    )


def _train_fold(job: FoldTraining, folds: int, say: Callable[[str], None]) -> float:
    """Train a fold unless it is finished; give the seconds of its training."""
    if job.is_finished():
        say(f"Fold {job.fold} of {folds} is finished already (folds count from 0).")
        return 0.0
    say(f"Fold {job.fold} of {folds} (folds count from 0).")
    return job.train(resume=True, say=say).seconds


def _scores(
    run: RunFolder, postprocessing: Postprocessing, progress: Progress | None
) -> JsonDict:
    """Sum up the folds' scores, as they are and as the post-processing leaves them."""
    dataset = load_run_dataset(run)
    held_out = held_out_cases(run, dataset)
    metrics = {
        fold: atomic.read_json(run.fold(fold) / "metrics.json") for fold in held_out
    }
    scores = summarize_folds({fold: item["cases"] for fold, item in metrics.items()})
    scores["rules"] = next(iter(metrics.values()))["rules"]
    scores["postprocessed"] = None
    if postprocessing.steps:
        cases = [case for group in held_out.values() for case in group]
        rows = iter(scores_after(cases, dataset, postprocessing, progress))
        scores["postprocessed"] = summarize_folds(
            {
                fold: {case.id: next(rows) for case in group}
                for fold, group in held_out.items()
            }
        )
    return scores


def summarize_folds(
    folds: Mapping[str, Mapping[str, Mapping[str, JsonDict]]],
) -> JsonDict:
    """Sum up the scores of held-out cases, over all of them and fold by fold.

    Args:
        folds: Fold to case id to label to numbers, as `evaluate_case` gives them.

    Returns:
        {"folds": [...], "cases": their number, "summary": {label: {metric: ...}} over
        all cases, "mean": over labels, "by_fold": {fold: {"cases": [ids], "summary":
        {label: {metric: mean}}, "mean": ...}}}.
    """
    together = {
        f"fold {fold}: {case}": dict(rows)
        for fold, cases in folds.items()
        for case, rows in cases.items()
    }
    summary = summarize_cases(together)
    return {
        "folds": list(folds),
        "cases": len(together),
        "summary": summary,
        "mean": _mean_over_labels(_means(summary)),
        "by_fold": {fold: _fold(cases) for fold, cases in folds.items()},
    }


def _fold(cases: Mapping[str, Mapping[str, JsonDict]]) -> JsonDict:
    means = _means(summarize_cases({case: dict(rows) for case, rows in cases.items()}))
    return {"cases": list(cases), "summary": means, "mean": _mean_over_labels(means)}


def _means(summary: JsonDict) -> dict[str, dict[str, float]]:
    return {
        label: {
            metric: numbers["mean"]
            for metric, numbers in row.items()
            if isinstance(numbers, dict)
        }
        for label, row in summary.items()
    }


def _mean_over_labels(means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        metric: sum(row[metric] for row in means.values()) / len(means)
        for metric in _MEAN_OF
    }
