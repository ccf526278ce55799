"""Decide a run's post-processing from the cases that its folds held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from segmamba import atomic
from segmamba.data.dataset import Dataset, dataset_from_dict
from segmamba.data.parallel import for_each_case
from segmamba.errors import ConfigError, FormatError, describe
from segmamba.evaluation.evaluate import evaluate_case
from segmamba.inference.postprocessing import (
    Postprocessing,
    apply_postprocessing,
    save_postprocessing,
)
from segmamba.inference.postprocessing_choice import (
    HeldOutCase,
    decide_postprocessing,
    read_held_out,
)
from segmamba.types import JsonDict
from segmamba.workflow.folder import Progress, RunFolder, staged


def postprocess(
    run: Path | str,
    *,
    progress: Progress | None = None,
) -> Postprocessing:
    """Decide the post-processing from the held-out cases of all folds, and store it.

    Writes `postprocessing.json` into the run; `predict` does what it says.

    Args:
        run: A run folder in which a fold or more are trained and validated.
        progress: Called with the cases done, all cases, and what is being done.

    Returns:
        The steps and how they were decided.

    Raises:
        ConfigError: It is no run, or no fold is validated.
        FormatError: A label map is unreadable.
    """
    folder = RunFolder(Path(run))
    dataset = load_run_dataset(folder)
    held_out = held_out_cases(folder, dataset)
    cases = [case for group in held_out.values() for case in group]
    decided = decide_postprocessing(
        cases, dataset.labels, progress=staged(progress, "deciding post-processing")
    )
    decided = dataclasses.replace(
        decided, decision={"folds": list(held_out), **decided.decision}
    )
    save_postprocessing(folder.postprocessing, decided)
    return decided


def load_run_dataset(run: RunFolder) -> Dataset:
    """Read the data set that a run was made for.

    Raises:
        ConfigError: It is no run.
    """
    if not run.dataset.exists():
        raise ConfigError(
            describe(
                "this is no run",
                expected="a folder with dataset.json, as 'segmamba train' writes it",
                file=run.root,
            )
        )
    return dataset_from_dict(atomic.read_json(run.dataset), source=run.dataset)


def held_out_cases(run: RunFolder, dataset: Dataset) -> dict[str, list[HeldOutCase]]:
    """Find the held-out predictions of all folds that are validated.

    Args:
        run: The run.
        dataset: Its data set.

    Returns:
        Fold to its cases, in ascending order; fold "all" holds none out.

    Raises:
        ConfigError: No fold is validated.
        FormatError: A fold's scores are of a case that the data set lacks.
    """
    folds = sorted(
        int(path.parent.name.removeprefix("fold_"))
        for path in run.root.glob("fold_*/metrics.json")
        if path.parent.name.removeprefix("fold_").isdigit()
    )
    if not folds:
        raise ConfigError(
            describe(
                "there are no held-out predictions to decide from",
                expected="fold_0/metrics.json or another fold's",
                file=run.root,
                remedy="Train a fold, or all with 'segmamba train --cross-validate'.",
            )
        )
    references = {case.id: case.label for case in dataset.cases if case.label}
    return {str(fold): _cases(run.fold(str(fold)), references) for fold in folds}


def scores_after(
    cases: list[HeldOutCase],
    dataset: Dataset,
    postprocessing: Postprocessing,
    progress: Progress | None = None,
) -> list[dict[str, JsonDict]]:
    """Score held-out predictions as the post-processing leaves them.

    Args:
        cases: The cases.
        dataset: Their data set.
        postprocessing: What to do to their label maps.
        progress: Called with the cases done, all cases, and what is being done.

    Returns:
        For each case what `evaluate_case` gives.
    """

    def score(case: HeldOutCase) -> dict[str, JsonDict]:
        found, truth, spacing = read_held_out(case)
        found = apply_postprocessing(
            found, spacing, postprocessing.steps, dataset.labels
        )
        return evaluate_case(found, truth, spacing, dataset.labels)

    return for_each_case(score, cases, progress=staged(progress, "evaluating"))


def _cases(fold: Path, references: dict[str, Path]) -> list[HeldOutCase]:
    scored = list(atomic.read_json(fold / "metrics.json")["cases"])
    unknown = [case for case in scored if case not in references]
    if unknown:
        raise FormatError(
            describe(
                "the scores are of cases that the data set lacks",
                found=", ".join(unknown[:5]),
                file=fold / "metrics.json",
                remedy="Train this fold anew.",
            )
        )
    return [
        HeldOutCase(case, fold / "validation" / f"{case}.nii.gz", references[case])
        for case in scored
    ]
