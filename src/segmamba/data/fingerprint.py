"""What a data set looks like: shapes, spacings, intensities, label sizes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np

from segmamba.config import to_dict
from segmamba.data.dataset import Case, Dataset
from segmamba.data.geometry import axis_codes, nonzero_box, world_axes
from segmamba.data.labels import LabelScheme
from segmamba.data.parallel import Progress, for_each_case
from segmamba.errors import FormatError, GeometryError, describe
from segmamba.io import read_case, read_volume
from segmamba.io.volume import Volume
from segmamba.types import Array, JsonDict, Size3, Spacing3

SAMPLES_PER_CASE = 10_000
"""Foreground voxels that each case gives to the intensity statistics."""

Modality = Literal["ct", "none", "other"]
"""ct: Hounsfield units; none: asked to stay as it is; other: MR and the rest."""

_CT_WORDS = {"ct", "cta", "cect", "ncct", "cbct", "hu", "hounsfield"}
_RAW_WORDS = {"nonorm", "no_normalization"}
_ANONYMOUS_WORDS = {"", "image", "img", "channel", "modality", "scan", "input"}


@dataclass(frozen=True)
class CaseFingerprint:
    """One case's grid and labels."""

    id: str
    """The case's name."""
    shape: Size3
    """Voxels of the file along (I, J, K)."""
    spacing_mm: Spacing3
    """Voxel distance along (I, J, K)."""
    orientation: str
    """Axis codes of (I, J, K), such as "LPS"."""
    cropped_shape: Size3
    """Voxels along (I, J, K) of the box that isn't zero in every channel."""
    label_voxels: dict[str, int]
    """Voxels of each label or region, by name."""


@dataclass(frozen=True)
class ChannelFingerprint:
    """One channel's intensities in the foreground of all cases.

    That is where the label is neither 0 nor ignored; in cases without such voxels,
    where the image isn't 0.
    """

    name: str
    """The data set's name of the channel."""
    modality: Modality
    """Guess from the name, else from the intensities."""
    mean: float
    """Mean."""
    std: float
    """Standard deviation."""
    median: float
    """Median."""
    min: float
    """Smallest of the sampled voxels."""
    max: float
    """Largest of the sampled voxels."""
    percentile_00_5: float
    """Half a percent lies below."""
    percentile_99_5: float
    """Half a percent lies above."""
    zero_share: float
    """Share of voxels of the whole image that are exactly 0: the median case."""


@dataclass(frozen=True)
class Fingerprint:
    """What planning needs to know of a data set. JSON-able."""

    dataset: str
    """The data set's name."""
    cases: tuple[CaseFingerprint, ...]
    """Labelled cases, sorted by id."""
    channels: tuple[ChannelFingerprint, ...]
    """Channels in the data set's order."""
    median_spacing_mm: Spacing3
    """Median voxel distance along (R-L, A-P, S-I)."""
    median_shape: Size3
    """Median voxels along (R-L, A-P, S-I), after the crop."""
    label_voxels: dict[str, int]
    """Voxels of each label or region in all cases."""

    def to_dict(self) -> JsonDict:
        """Give plain values for JSON."""
        return to_dict(self)


@dataclass(frozen=True)
class _Examined:
    """What is kept of a case while the others are read."""

    case: CaseFingerprint
    samples: Array  # float32 (C, n)
    zero_shares: tuple[float, ...]
    lowest: tuple[float, ...]


def make_fingerprint(
    dataset: Dataset,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Fingerprint:
    """Read every labelled case once and sum it up.

    Args:
        dataset: The data set.
        workers: Threads; None takes the number of cores, 8 at most.
        progress: Called with (done, total, case id).

    Returns:
        The fingerprint. The same files give the same one, whatever the threads.

    Raises:
        FormatError: There is no labelled case, or a file can't be used; the text
            names case and file.
        GeometryError: Image and label map differ in shape.
    """
    if not dataset.cases:
        raise FormatError(
            describe(
                "no labelled case",
                expected="at least one image with a label map",
                file=dataset.root,
            )
        )
    cases = sorted(dataset.cases, key=lambda case: case.id)
    examined = for_each_case(
        partial(_examine, dataset=dataset), cases, workers=workers, progress=progress
    )
    return _summarize(dataset, examined)


def canonical(values: Sequence[float], orientation: str) -> tuple[float, float, float]:
    """Sort three values of file axes into the order (R-L, A-P, S-I).

    Args:
        values: One value for each of I, J, K.
        orientation: Axis codes of (I, J, K).

    Returns:
        The same values, one for each patient axis.
    """
    ordered = [0.0, 0.0, 0.0]
    for value, axis in zip(values, world_axes(orientation), strict=True):
        ordered[axis] = value
    return ordered[0], ordered[1], ordered[2]


def guess_modality(name: str, lowest: Sequence[float]) -> Modality:
    """Guess what a channel's numbers mean.

    Args:
        name: The channel's name. A word such as "CT" decides; any other name that
            says something ("T1", "FLAIR", "PET") rules CT out.
        lowest: Smallest intensity of each case; asked only where the name says
            nothing ("image", "0"): air at -800 HU or less in nine cases of ten is CT.

    Returns:
        "ct", "none" (nnU-Net's "noNorm") or "other".
    """
    words = set("".join(c if c.isalnum() else " " for c in name.lower()).split())
    if words & _CT_WORDS or {"computed", "tomography"} <= words:
        return "ct"
    if name.lower() in _RAW_WORDS:
        return "none"
    meaningful = {word.rstrip("0123456789") for word in words} - _ANONYMOUS_WORDS
    if meaningful or len(lowest) == 0:
        return "other"
    return "ct" if np.mean(np.asarray(lowest) <= -800) >= 0.9 else "other"


def _examine(case: Case, dataset: Dataset) -> _Examined:
    volume = read_case(case.images, frame=case.frame)
    label = read_label(case, volume)
    _check_image(volume, case, len(dataset.channels))
    box = nonzero_box(volume.array)
    fingerprint = CaseFingerprint(
        id=case.id,
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        orientation=axis_codes(volume.affine),
        cropped_shape=cast(Size3, tuple(stop - start for start, stop in box)),
        label_voxels=_count_labels(label, dataset.labels),
    )
    return _Examined(
        fingerprint,
        _sample_foreground(volume.array, label, dataset.labels, case.id),
        tuple(float(np.mean(channel == 0)) for channel in volume.array),
        tuple(float(channel.min()) for channel in volume.array),
    )


def read_label(case: Case, volume: Volume) -> Array:
    """Read a case's label map and see that it lies on the image's grid.

    Args:
        case: The case.
        volume: Its image.

    Returns:
        The file's numbers, (I, J, K).

    Raises:
        FormatError: There is none, or it has several channels.
        GeometryError: Its shape isn't the image's.
    """
    if case.label is None:
        raise FormatError(describe(f"case '{case.id}' has no label map"))
    label = read_volume(case.label)
    if len(label.array) != 1:
        raise FormatError(
            describe(
                "a label map has several channels",
                expected=1,
                found=len(label.array),
                file=case.label,
            )
        )
    if label.shape != volume.shape:
        raise GeometryError(
            describe(
                "image and label map differ in shape",
                expected=volume.shape,
                found=label.shape,
                file=case.label,
            )
        )
    return label.array[0]


def _check_image(volume: Volume, case: Case, channels: int) -> None:
    if len(volume.array) != channels:
        raise FormatError(
            describe(
                "wrong number of channels",
                expected=channels,
                found=len(volume.array),
                file=case.images[0],
            )
        )
    for index, channel in enumerate(volume.array):
        if not np.isfinite(channel).all():
            file = case.images[min(index, len(case.images) - 1)]
            raise FormatError(
                describe(
                    "voxels are NaN or infinite", expected="finite numbers", file=file
                )
            )


def _count_labels(label: Array, scheme: LabelScheme) -> dict[str, int]:
    values, counts = np.unique(label, return_counts=True)
    return {
        name: int(counts[np.isin(values, group)].sum())
        for name, group in scheme.evaluated.items()
    }


def _sample_foreground(
    image: Array, label: Array, scheme: LabelScheme, case_id: str
) -> Array:
    """Draw voxels with replacement off a list; the id seeds it, so it never changes."""
    known = [value for value in scheme.known_values if value != 0]
    foreground = np.flatnonzero(
        np.isin(label, [value for value in known if value != scheme.ignore_label])
    )
    if len(foreground) == 0:
        foreground = np.flatnonzero((image != 0).any(axis=0))
    if len(foreground) == 0:
        return np.zeros((len(image), 0), np.float32)
    generator = np.random.default_rng(zlib.crc32(case_id.encode()))
    picks = foreground[generator.integers(0, len(foreground), SAMPLES_PER_CASE)]
    places = np.unravel_index(picks, image.shape[1:])
    return image[(slice(None), *places)].astype(np.float32)


def _summarize(dataset: Dataset, examined: Sequence[_Examined]) -> Fingerprint:
    cases = tuple(one.case for one in examined)
    spacings = [canonical(case.spacing_mm, case.orientation) for case in cases]
    shapes = [canonical(case.cropped_shape, case.orientation) for case in cases]
    names = dataset.labels.evaluated
    return Fingerprint(
        dataset=dataset.name,
        cases=cases,
        channels=tuple(
            _summarize_channel(name, index, examined)
            for index, name in enumerate(dataset.channels)
        ),
        median_spacing_mm=cast(
            Spacing3, tuple(float(x) for x in np.median(spacings, axis=0))
        ),
        median_shape=cast(Size3, tuple(round(x) for x in np.median(shapes, axis=0))),
        label_voxels={
            name: sum(case.label_voxels[name] for case in cases) for name in names
        },
    )


def _summarize_channel(
    name: str, index: int, examined: Sequence[_Examined]
) -> ChannelFingerprint:
    values = np.concatenate([one.samples[index] for one in examined]).astype(np.float64)
    values = values if len(values) else np.zeros(1)
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return ChannelFingerprint(
        name=name,
        modality=guess_modality(name, [one.lowest[index] for one in examined]),
        mean=float(values.mean()),
        std=float(values.std()),
        median=float(median),
        min=float(values.min()),
        max=float(values.max()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
        zero_share=float(np.median([one.zero_shares[index] for one in examined])),
    )
