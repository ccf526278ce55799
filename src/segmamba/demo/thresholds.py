"""What the best thresholds on FLAIR and T1 with contrast agent reach on BraTS.

A network that isn't clearly better has learnt nothing that a histogram doesn't show.
The baseline is meant to be strong: z-scores in the brain, optional smoothing, largest
component, filled holes, closed rims, and every number chosen on the training cases by
their mean Dice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage

from segmamba.data.dataset import Case, Dataset
from segmamba.demo.fields import bounding_box, fill_holes, largest_piece
from segmamba.errors import ConfigError, describe
from segmamba.evaluation.metrics import dice
from segmamba.io import read_case, read_volume
from segmamba.types import Array, FloatArray

REGIONS = ("WT", "TC", "ET")
"""Whole tumour, tumour core, enhancing tumour."""

_FLAIR_NAMES = ("t2f", "flair")
_T1C_NAMES = ("t1c", "t1ce", "t1gd", "t1post")
_FLAIR_LEVELS = tuple(np.round(np.arange(0.4, 3.01, 0.2), 2))
_T1C_LEVELS = tuple(np.round(np.arange(0.4, 3.21, 0.2), 2))
_DARK_LEVELS = (None, -2.5, -2.0, -1.5, -1.0, -0.5)
_SMOOTHING = (0.0, 1.0)
_CLOSING = (0, 1, 3)


@dataclass(frozen=True)
class Thresholds:
    """The numbers of the baseline; intensities are z-scores within the brain."""

    flair: float
    """Whole tumour: FLAIR above this, largest component, holes filled."""
    flair_smoothing: float
    """Gaussian in front of it, in voxels."""
    t1c: float
    """Enhancing tumour: T1 with contrast agent above this, in the whole tumour."""
    closing: int
    """Core: the enhancing part closed by so many voxels, holes filled."""
    dark: float | None
    """Core: also T1 with contrast agent below this; None for no such part."""


@dataclass(frozen=True)
class BaselineResult:
    """What the thresholds reach on held-out cases."""

    thresholds: Thresholds
    cases: dict[str, dict[str, float]]
    """Case id to region to Dice."""

    @property
    def mean(self) -> dict[str, float]:
        """Mean Dice of each region over the cases."""
        return {
            region: float(np.mean([case[region] for case in self.cases.values()]))
            for region in REGIONS
        }

    @property
    def mean_dice(self) -> float:
        """Mean of the regions' means."""
        return float(np.mean(list(self.mean.values())))


@dataclass(frozen=True)
class _Brain:
    """One case cut to its brain: z-scores and the true regions."""

    flair: FloatArray
    flair_smooth: FloatArray
    t1c: FloatArray
    regions: dict[str, Array]


def threshold_baseline(
    dataset: Dataset,
    train_ids: Sequence[str],
    test_ids: Sequence[str],
    *,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> BaselineResult:
    """Choose thresholds on some cases and apply them to others.

    Args:
        dataset: BraTS-like: with FLAIR and T1-with-contrast channels and three
            nested regions.
        train_ids: Cases to choose on.
        test_ids: Cases to report.
        workers: Threads; None for 2.
        progress: Called with (done, total, what).

    Returns:
        The thresholds and the Dice of each region of each test case.

    Raises:
        ConfigError: The data set has no such channels or regions, or an id is
            unknown.
    """
    cases = {case.id: case for case in dataset.cases}
    train, test = _pick(cases, train_ids), _pick(cases, test_ids)
    load = partial(_load, dataset=dataset)
    with ThreadPoolExecutor(workers or 2) as pool:
        brains = list(pool.map(load, train))
        best = _fit(brains, pool.map, progress)
        scores = pool.map(lambda case: _score(load(case), best), test)
        result = {case.id: score for case, score in zip(test, scores, strict=True)}
    return BaselineResult(best, result)


def segment(
    flair: FloatArray, t1c: FloatArray, thresholds: Thresholds
) -> dict[str, Array]:
    """Apply the baseline.

    Args:
        flair: (I, J, K) z-scores within the brain, smoothed as the thresholds say;
            minus infinity outside.
        t1c: (I, J, K) z-scores within the brain.
        thresholds: Its numbers.

    Returns:
        Masks (I, J, K) of WT, TC and ET.
    """
    whole = _whole(flair, thresholds.flair)
    enhancing = whole & (t1c > thresholds.t1c)
    core = _with_dark(
        _closed(enhancing, thresholds.closing), whole, t1c, thresholds.dark
    )
    return {"WT": whole, "TC": core, "ET": enhancing}


def find_channel(channels: Sequence[str], names: Iterable[str], what: str) -> int:
    """Find a channel by the names it goes by.

    Raises:
        ConfigError: None of the channels has such a name.
    """
    for index, channel in enumerate(channels):
        if channel.lower() in names:
            return index
    raise ConfigError(
        describe(
            f"the threshold baseline needs a {what} channel",
            expected=" or ".join(names),
            found=", ".join(channels),
        )
    )


def _pick(cases: dict[str, Case], ids: Sequence[str]) -> list[Case]:
    unknown = sorted(set(ids) - set(cases))
    if unknown or not ids:
        raise ConfigError(
            describe(
                "cases for the threshold baseline are not in the data set",
                expected="ids of labelled cases",
                found=", ".join(unknown) or "none",
            )
        )
    return [cases[name] for name in ids]


def _load(case: Case, dataset: Dataset) -> _Brain:
    assert case.label is not None
    flair_index = find_channel(dataset.channels, _FLAIR_NAMES, "FLAIR")
    t1c_index = find_channel(dataset.channels, _T1C_NAMES, "T1-with-contrast")
    image = read_case(case.images).array
    label = read_volume(case.label).array[0]
    brain = np.any(image != 0, axis=0)
    box = bounding_box(brain)
    brain, label = brain[box], label[box]
    flair = _z_score(image[flair_index][box], brain, 0)
    smooth = _z_score(image[flair_index][box], brain, _SMOOTHING[1])
    t1c = _z_score(image[t1c_index][box], brain, 0)
    return _Brain(flair, smooth, t1c, _true_regions(label, dataset))


def _z_score(image: FloatArray, brain: Array, smoothing: float) -> FloatArray:
    """Smooth within the mask, then standardise; minus infinity outside."""
    image = image.astype(np.float32)
    if smoothing:
        weight = ndimage.gaussian_filter(brain.astype(np.float32), smoothing)
        smooth = ndimage.gaussian_filter(image * brain, smoothing)
        image = smooth / np.maximum(weight, 1e-3)
    inside = image[brain]
    score = (image - inside.mean()) / max(float(inside.std()), 1e-6)
    return np.where(brain, score, -np.inf).astype(np.float32)


def _true_regions(label: Array, dataset: Dataset) -> dict[str, Array]:
    """Order the three nested regions by how many integers they unite."""
    groups = sorted(dataset.labels.evaluated.values(), key=len, reverse=True)
    nested = all(set(b) < set(a) for a, b in itertools.pairwise(groups))
    if len(groups) != 3 or not nested:
        raise ConfigError(
            describe(
                "the threshold baseline needs the nested regions of BraTS",
                expected="whole tumour, tumour core, enhancing tumour",
                found=", ".join(dataset.labels.evaluated),
            )
        )
    pairs = zip(REGIONS, groups, strict=True)
    return {name: np.isin(label, group) for name, group in pairs}


def _fit(
    brains: list[_Brain],
    run: Callable[..., Iterable[FloatArray]],
    progress: Callable[[int, int, str], None] | None,
) -> Thresholds:
    """Choose WT first, then ET and TC inside the chosen WT."""
    options = list(itertools.product(_SMOOTHING, _FLAIR_LEVELS))
    table = list(run(lambda brain: _whole_scores(brain, options), brains))
    smoothing, flair = options[int(np.argmax(np.mean(table, axis=0)))]
    if progress is not None:
        progress(1, 2, "threshold of FLAIR")

    def score(brain: _Brain) -> FloatArray:
        return _inner_scores(brain, flair, smoothing)

    mean = np.mean(list(run(score, brains)), axis=0)
    level, close, dim = np.unravel_index(int(np.argmax(mean)), mean.shape)
    if progress is not None:
        progress(2, 2, "threshold of T1 with contrast agent")
    return Thresholds(
        flair=float(flair),
        flair_smoothing=smoothing,
        t1c=float(_T1C_LEVELS[level]),
        closing=_CLOSING[close],
        dark=_DARK_LEVELS[dim],
    )


def _whole_scores(brain: _Brain, options: Sequence[tuple[float, float]]) -> FloatArray:
    return np.array(
        [
            dice(_whole(_flair(brain, smoothing), level), brain.regions["WT"])
            for smoothing, level in options
        ]
    )


def _inner_scores(brain: _Brain, flair: float, smoothing: float) -> FloatArray:
    """Sum of the Dice of TC and ET: (T1C levels, closings, dark levels)."""
    whole = _whole(_flair(brain, smoothing), flair)
    place = whole | brain.regions["WT"]
    scores = np.zeros((len(_T1C_LEVELS), len(_CLOSING), len(_DARK_LEVELS)))
    if not place.any():
        return scores + 2
    box = bounding_box(place)
    whole, t1c = whole[box], brain.t1c[box]
    truth = {name: mask[box] for name, mask in brain.regions.items()}
    for i, level in enumerate(_T1C_LEVELS):
        enhancing = whole & (t1c > level)
        scores[i] += dice(enhancing, truth["ET"])
        for j, closing in enumerate(_CLOSING):
            closed = _closed(enhancing, closing)
            for k, dark in enumerate(_DARK_LEVELS):
                core = _with_dark(closed, whole, t1c, dark)
                scores[i, j, k] += dice(core, truth["TC"])
    return scores


def _score(brain: _Brain, thresholds: Thresholds) -> dict[str, float]:
    flair = _flair(brain, thresholds.flair_smoothing)
    found = segment(flair, brain.t1c, thresholds)
    return {name: dice(found[name], brain.regions[name]) for name in REGIONS}


def _flair(brain: _Brain, smoothing: float) -> FloatArray:
    return brain.flair_smooth if smoothing else brain.flair


def _whole(flair: FloatArray, level: float) -> Array:
    """Threshold, largest component, holes filled."""
    mask = largest_piece(flair > level)
    if mask.any():
        box = bounding_box(mask)
        mask[box] = fill_holes(mask[box])
    return mask


def _closed(enhancing: Array, closing: int) -> Array:
    """Close a rim by so many voxels and fill what it encloses."""
    if closing and enhancing.any():
        box = bounding_box(enhancing)
        part = np.pad(enhancing[box], closing)
        part = ndimage.binary_closing(part, iterations=closing)
        closed = np.zeros_like(enhancing)
        closed[box] = part[(slice(closing, -closing),) * 3]
        enhancing = closed
    return fill_holes(enhancing)


def _with_dark(core: Array, whole: Array, t1c: FloatArray, dark: float | None) -> Array:
    return core if dark is None else core | (whole & (t1c < dark))
