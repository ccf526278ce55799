"""Write label maps as DICOM-SEG, referring to the series that was segmented."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segmamba._version import __version__
from segmamba.atomic import atomic_path
from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    FormatError,
    GeometryError,
    describe,
)
from segmamba.io.dicom import DicomSeries
from segmamba.io.dicom_files import open_files
from segmamba.io.dicom_headers import missing_library, read_dataset
from segmamba.io.dicom_segments import Segment
from segmamba.types import Array

SegType = Literal["BINARY", "LABELMAP"]
"""One bit mask for each segment (every viewer), or one label map (small, newer)."""

_SERIES_OFFSET = 1000
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
    "ReferringPhysicianName",
)
"""Tags that must be there but may hold nothing; anonymisation often takes them out."""
_SLICE_TYPES = {True: np.uint8, False: np.uint16}


def check_can_write() -> None:
    """Find out before anything is computed that a library is missing.

    Raises:
        BackendUnavailableError: highdicom isn't installed.
    """
    _highdicom()


def write_dicom_seg(
    path: Path | str,
    label_map: Array,
    series: DicomSeries,
    segments: Sequence[Segment],
    *,
    kind: SegType = "BINARY",
) -> None:
    """Write a label map as a DICOM-SEG, atomically.

    Patient and study are taken over from the series, each frame refers to the slice
    that it lies on. With "BINARY", frames without a voxel are left out, as is usual.

    Args:
        path: The file, such as case.dcm.
        label_map: (I, J, K), integers, on the grid of `series`.
        series: What was segmented, or its first channel.
        segments: What the integers mean; all but 0 that occur must be described.
        kind: "BINARY" or "LABELMAP".

    Raises:
        GeometryError: The label map isn't on the grid of the series.
        ConfigError: A label has no segment, or `kind` is unknown.
        FormatError: The series' headers lack what a DICOM-SEG needs, or the file can't
            be written.
        BackendUnavailableError: highdicom isn't installed.
    """
    if kind not in ("BINARY", "LABELMAP"):
        raise ConfigError(
            describe("bad kind of DICOM-SEG", expected="BINARY or LABELMAP", found=kind)
        )
    if label_map.shape != series.shape:
        raise GeometryError(
            describe(
                "a label map is not on the grid of its series",
                expected=f"shape {series.shape}",
                found=label_map.shape,
                file=path,
            )
        )
    numbers = _numbered(label_map, segments)
    sources = source_headers(series)
    with composing("a DICOM-SEG", series, path), atomic_path(path) as temporary:
        _compose(numbers, series, sources, segments, kind).save_as(temporary)


def _numbered(label_map: Array, segments: Sequence[Segment]) -> Array:
    """Turn labels into segment numbers 1, 2 ...: (slices, rows, columns)."""
    values = [segment.value for segment in segments]
    strange = set(np.unique(label_map).tolist()) - {0, *values}
    if strange or not values:
        raise ConfigError(
            describe(
                "labels without a segment",
                expected=f"one of {values} or 0",
                found=sorted(strange) or "no segments",
            )
        )
    numbers = np.zeros(label_map.shape[::-1], _SLICE_TYPES[len(values) < 256])
    for number, value in enumerate(values, start=1):
        numbers[value == label_map.T] = number
    return numbers


def source_headers(series: DicomSeries) -> list[Any]:
    """Read a series' headers again, with empty tags where anonymisation took them out.

    Args:
        series: The series.

    Returns:
        A pydicom data set for each slice in order, or one of all frames.

    Raises:
        FormatError: The series is of several multi-frame files.
    """
    opened = open_files(series.files)
    read = {file: read_dataset(file, stream) for file, stream in opened}
    for data in read.values():
        for tag in _MAY_BE_EMPTY:
            if tag not in data:
                setattr(data, tag, "")
    if len(read) == 1:
        return list(read.values())
    if any(len(header.slices) > 1 for header in series.headers):
        raise FormatError(
            describe(
                "can't refer to a series of several multi-frame files",
                expected="one multi-frame file, or one file for each slice",
                found=f"{len(read)} files, {len(series.slices)} slices",
                file=series.source,
            )
        )
    return [read[item.file] for item in series.slices]


def _compose(
    numbers: Array,
    series: DicomSeries,
    sources: list[Any],
    segments: Sequence[Segment],
    kind: SegType,
) -> Any:
    highdicom = _highdicom()
    if len(sources) == 1:  # in the order of the frames in the file
        frames = [item.frame for item in series.slices]
        numbers = numbers[np.argsort(frames)]
    number = _SERIES_OFFSET + (series.number or 0)
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(numbers),
        segmentation_type=kind,
        segment_descriptions=_descriptions(segments),
        series_instance_uid=highdicom.UID(),
        series_number=number,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="segmamba",
        manufacturer_model_name="segmamba",
        software_versions=__version__,
        device_serial_number="0",
        series_description="segmamba segmentation",
        content_label="SEGMENTATION",
        content_description="Made by a neural network",
        omit_empty_frames=kind == "BINARY",
    )


def _descriptions(segments: Sequence[Segment]) -> list[Any]:
    highdicom = _highdicom()
    concept = highdicom.sr.CodedConcept
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="segmamba",
        family=concept("123109", "DCM", "Artificial Intelligence"),
        version=__version__,
    )
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=segment.name[:64],
            segmented_property_category=concept(*segment.category),
            segmented_property_type=concept(*segment.kind),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=highdicom.color.CIELabColor.from_rgb(*segment.color),
        )
        for number, segment in enumerate(segments, start=1)
    ]


def _highdicom() -> Any:
    try:
        import highdicom.color
        import highdicom.seg
        import highdicom.sr
    except ImportError as error:
        raise missing_library("highdicom") from error
    return highdicom


@contextlib.contextmanager
def composing(what: str, series: DicomSeries, path: Path | str) -> Iterator[None]:
    """Turn whatever a DICOM library raises while it writes into one error.

    Args:
        what: What is written, with its article.
        series: What it refers to.
        path: The file.

    Raises:
        FormatError: In place of the library's error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BackendUnavailableError:
        raise
    except OSError as error:
        raise FormatError(
            describe(
                f"can't write {what}",
                found=error.strerror or type(error).__name__,
                file=path,
                remedy="Check the folder's rights and the space on the disk.",
            )
        ) from error
    except Exception as error:  # highdicom raises nearly every type there is
        raise FormatError(
            describe(
                f"can't make {what} of this series",
                expected=f"the headers of a whole study in {series.name}",
                found=f"{type(error).__name__} ({str(error)[:300]})",
                file=series.source,
                remedy="The label map as .nii.gz is not affected.",
            )
        ) from error
