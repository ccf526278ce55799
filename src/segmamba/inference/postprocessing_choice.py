"""Decide the post-processing from held-out predictions, as nnU-Net does.

Source: the rule of nnU-Net (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z): a
step is adopted only where it raises the mean Dice of the cross-validation and lowers no
class's. nnU-Net tries the largest component; minimal sizes and holes are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segmamba.data.labels import LabelScheme
from segmamba.data.parallel import Progress, for_each_case
from segmamba.errors import FormatError, GeometryError, describe
from segmamba.evaluation.metrics import bounding_box, dice
from segmamba.inference.postprocessing import (
    Postprocessing,
    PostprocessingStep,
    apply_postprocessing,
)
from segmamba.io import read_volume
from segmamba.types import Array, FloatArray, JsonDict, Spacing3

MIN_VOLUMES_MM3 = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Minimal sizes that are tried for every label."""

RULE = (
    "label by label, first the largest component and all minimal sizes, then hole "
    "filling: the best that raises the mean Dice over labels and cases and lowers "
    "the mean of no label is adopted, and the next is tried on its result"
)

_ROUNDING = 1e-9
"""Changes of a mean Dice up to this one are none."""


@dataclass(frozen=True)
class HeldOutCase:
    """A case that was predicted by a model that had not seen it."""

    id: str
    """The case."""
    prediction: Path
    """Its predicted label map, not post-processed."""
    reference: Path
    """Its label map."""


def decide_postprocessing(
    cases: Sequence[HeldOutCase],
    scheme: LabelScheme,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Postprocessing:
    """Choose the steps that raise the mean Dice and lower no label's.

    Args:
        cases: Held-out predictions with their references, one at least.
        scheme: The labels' meaning.
        workers: Threads; None for as many as there are cores, 8 at most.
        progress: Called after each case of each round with done, total and its id.

    Returns:
        The steps, and as `decision`: "cases", "dice_before" and "dice_after" (mean by
        label), "mean_dice_before" and "mean_dice_after", "rule", and "candidates":
        each with its "gain" over what was adopted before it, "gain_by_label", and
        whether it was "adopted".

    Raises:
        FormatError: There is no case, or a label map is unreadable.
        GeometryError: A prediction and its reference differ in shape.
    """
    if not cases:
        raise FormatError(describe("no held-out case to decide from", expected="one"))
    rounds = [group for name in scheme.evaluated for group in _candidates(name)]
    steps: list[PostprocessingStep] = []
    tried: list[JsonDict] = []
    before = after = np.zeros(0)
    for index, candidates in enumerate(rounds):
        shown = _shown(progress, index, len(rounds))
        means = _mean_dice(cases, scheme, steps, candidates, workers, shown)
        before = means[0] if index == 0 else before
        chosen = _best(means)
        tried += _describe(candidates, means, scheme, chosen)
        if chosen is not None:
            steps.append(candidates[chosen])
        after = means[0 if chosen is None else chosen + 1]
    decision = {
        "rule": RULE,
        "cases": len(cases),
        "mean_dice_before": float(before.mean()),
        "mean_dice_after": float(after.mean()),
        "dice_before": _by_label(scheme, before),
        "dice_after": _by_label(scheme, after),
        "candidates": tried,
    }
    return Postprocessing(tuple(steps), decision)


def read_held_out(case: HeldOutCase) -> tuple[Array, Array, Spacing3]:
    """Read a case's two label maps.

    Args:
        case: The case.

    Returns:
        Prediction (I, J, K), reference (I, J, K), and the edges of a voxel in mm.

    Raises:
        FormatError: One is unreadable.
        GeometryError: Their shapes differ.
    """
    found, truth = (
        read_volume(path, dtype=np.int16) for path in (case.prediction, case.reference)
    )
    if found.array.shape != truth.array.shape:
        raise GeometryError(
            describe(
                "prediction and reference differ in shape",
                expected=truth.shape,
                found=found.shape,
                file=case.prediction,
                remedy="Run 'segmamba train' with --resume to predict it again.",
            )
        )
    return found.array[0], truth.array[0], truth.spacing_mm


def _candidates(label: str) -> list[list[PostprocessingStep]]:
    sizes = [PostprocessingStep(label, "minimal-size", mm3) for mm3 in MIN_VOLUMES_MM3]
    return [
        [PostprocessingStep(label, "largest-component"), *sizes],
        [PostprocessingStep(label, "fill-holes")],
    ]


def _mean_dice(
    cases: Sequence[HeldOutCase],
    scheme: LabelScheme,
    steps: Sequence[PostprocessingStep],
    candidates: Sequence[PostprocessingStep],
    workers: int | None,
    progress: Progress | None,
) -> FloatArray:
    """Give mean Dice (1 + candidates, labels); the first row is without candidate."""

    def score(case: HeldOutCase) -> FloatArray:
        found, truth, spacing = _cropped(*read_held_out(case))
        found = apply_postprocessing(found, spacing, steps, scheme)
        rows = [_dice(found, truth, scheme)]
        for step in candidates:
            changed = apply_postprocessing(found, spacing, [step], scheme)
            rows.append(_dice(changed, truth, scheme))
        return np.asarray(rows)

    scores = for_each_case(score, cases, workers=workers, progress=progress)
    return np.mean(scores, axis=0)


def _cropped(
    found: Array, truth: Array, spacing_mm: Spacing3
) -> tuple[Array, Array, Spacing3]:
    """Cut away what is background in both."""
    anything = (found != 0) | (truth != 0)
    if anything.any():
        box = bounding_box(anything)
        found, truth = found[box], truth[box]
    return found, truth, spacing_mm


def _dice(found: Array, truth: Array, scheme: LabelScheme) -> list[float]:
    if scheme.ignore_label is not None:
        found = np.where(truth == scheme.ignore_label, 0, found)
    return [
        dice(np.isin(found, group), np.isin(truth, group))
        for group in scheme.evaluated.values()
    ]


def _best(means: FloatArray) -> int | None:
    """Choose the candidate of the highest mean among those that lower no label's."""
    gains = means[1:] - means[0]
    total = np.where(gains.min(axis=1) >= -_ROUNDING, gains.mean(axis=1), -np.inf)
    best = int(np.argmax(total))
    return best if total[best] > _ROUNDING else None


def _describe(
    candidates: Sequence[PostprocessingStep],
    means: FloatArray,
    scheme: LabelScheme,
    chosen: int | None,
) -> list[JsonDict]:
    return [
        {
            "label": step.label,
            "operation": step.operation,
            "min_volume_mm3": step.min_volume_mm3,
            "gain": float((means[index + 1] - means[0]).mean()),
            "gain_by_label": _by_label(scheme, means[index + 1] - means[0]),
            "adopted": index == chosen,
        }
        for index, step in enumerate(candidates)
    ]


def _by_label(scheme: LabelScheme, values: FloatArray) -> dict[str, float]:
    return dict(zip(scheme.evaluated, map(float, values), strict=True))


def _shown(progress: Progress | None, index: int, rounds: int) -> Progress | None:
    """Turn the cases of a round into progress of the whole decision."""
    if progress is None:
        return None
    return lambda done, total, item: progress(
        index * total + done, rounds * total, item
    )
