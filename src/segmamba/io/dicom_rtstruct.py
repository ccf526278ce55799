"""Write label maps as RTSTRUCT: contours in the planes of the series.

A contour runs half-way between the centres of voxels inside and outside, so whoever
asks which centres it holds gets the very voxels back. Holes are joined to the contour
around them by a cut of no width, which readers of any age understand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from segmamba._version import __version__
from segmamba.atomic import atomic_path
from segmamba.errors import ConfigError, GeometryError, describe
from segmamba.io.dicom import DicomSeries
from segmamba.io.dicom_headers import pydicom_module
from segmamba.io.dicom_seg import composing, source_headers
from segmamba.io.dicom_segments import ANATOMY, Segment
from segmamba.types import Array, FloatArray

_SERIES_OFFSET = 2000
_DECIMALS = 4
"""Of coordinates in mm: a tenth of a micrometre."""
_PATIENT_AND_STUDY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
    *("ReferringPhysicianName", "FrameOfReferenceUID"),
)
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""What RTReferencedStudySequence names as the class of a study (retired, required)."""


def write_dicom_rtstruct(
    path: Path | str,
    label_map: Array,
    series: DicomSeries,
    segments: Sequence[Segment],
) -> None:
    """Write a label map as an RTSTRUCT, atomically.

    Args:
        path: The file, such as case_rtstruct.dcm.
        label_map: (I, J, K), integers, on the grid of `series`.
        series: What was segmented, or its first channel.
        segments: What the integers mean; all but 0 that occur must be described.

    Raises:
        GeometryError: The label map isn't on the grid of the series.
        ConfigError: A label has no segment.
        FormatError: The series' headers lack what an RTSTRUCT needs, or the file can't
            be written.
        BackendUnavailableError: pydicom isn't installed.
    """
    _check(label_map, series, segments, path)
    with composing("an RTSTRUCT", series, path), atomic_path(path) as temporary:
        data = _compose(label_map, series, source_headers(series), segments)
        data.save_as(temporary, enforce_file_format=True)


def contours(mask: Array) -> Iterator[FloatArray]:
    """Draw the outlines of a mask.

    Args:
        mask: (I, J).

    Yields:
        (points, 2) indices along I and J of one closed outline, the first point not
        repeated; holes are joined to what is around them.
    """
    from contourpy import FillType, contour_generator

    if not mask.any():
        return
    plane = np.pad(mask.T.astype(np.float64), 1)
    drawn = contour_generator(z=plane, fill_type=FillType.OuterOffset)
    for points, offsets in zip(*drawn.filled(0.5, np.inf), strict=True):
        rings = [
            _without_straight(points[start : stop - 1] - 1)
            for start, stop in itertools.pairwise(offsets)
        ]
        yield _joined(rings)


def _without_straight(ring: FloatArray) -> FloatArray:
    """Leave out points between two others on one line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return ring[np.abs(turns) > 1e-9]


def _joined(rings: Sequence[FloatArray]) -> FloatArray:
    """Make one ring of an outline and its holes, by the shortest cuts."""
    outline = rings[0]
    for hole in rings[1:]:
        gaps = ((outline[:, None] - hole[None]) ** 2).sum(axis=2)
        at, start = np.unravel_index(int(gaps.argmin()), gaps.shape)
        way = np.concatenate([hole[start:], hole[: start + 1]])
        outline = np.concatenate([outline[: at + 1], way, outline[at:]])
    return outline


def _check(
    label_map: Array,
    series: DicomSeries,
    segments: Sequence[Segment],
    path: Path | str,
) -> None:
    if label_map.shape != series.shape:
        raise GeometryError(
            describe(
                "a label map is not on the grid of its series",
                expected=f"shape {series.shape}",
                found=label_map.shape,
                file=path,
            )
        )
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


def _compose(
    label_map: Array,
    series: DicomSeries,
    sources: list[Any],
    segments: Sequence[Segment],
) -> Any:
    pydicom = pydicom_module()
    now, images = datetime.now(), _images(series, sources)
    data = _file()
    for tag in _PATIENT_AND_STUDY:
        setattr(data, tag, getattr(sources[0], tag))
    data.Modality, data.SeriesInstanceUID = "RTSTRUCT", pydicom.uid.generate_uid()
    data.SeriesNumber = _SERIES_OFFSET + (series.number or 0)
    data.SeriesDescription, data.InstanceNumber = "segmamba segmentation", 1
    data.Manufacturer = data.ManufacturerModelName = "segmamba"
    data.SoftwareVersions, data.OperatorsName = __version__, ""
    data.PositionReferenceIndicator = ""
    data.StructureSetLabel, data.ApprovalStatus = "SEGMENTATION", "UNAPPROVED"
    data.StructureSetDate, data.StructureSetTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
    data.ReferencedFrameOfReferenceSequence = [_reference(data, series, images)]
    numbered = list(enumerate(segments, start=1))
    frame = data.FrameOfReferenceUID
    data.StructureSetROISequence = [_roi(frame, *item) for item in numbered]
    data.ROIContourSequence = [
        _drawn(number, segment, label_map == segment.value, series, images)
        for number, segment in numbered
    ]
    data.RTROIObservationsSequence = [_observation(*item) for item in numbered]
    return data


def _file() -> Any:
    """Make an empty file; implicit types, as explicit ones end at 64 KiB a contour."""
    pydicom = pydicom_module()
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    data.SOPClassUID = pydicom.uid.RTStructureSetStorage
    data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.SpecificCharacterSet = "ISO_IR 192"
    return data


def _images(series: DicomSeries, sources: list[Any]) -> list[Any]:
    """Refer to each slice: its file, and its frame if the file has several."""
    pydicom = pydicom_module()
    found = []
    for index, item in enumerate(series.slices):
        source = sources[index if len(sources) > 1 else 0]
        image = pydicom.Dataset()
        image.ReferencedSOPClassUID = source.SOPClassUID
        image.ReferencedSOPInstanceUID = source.SOPInstanceUID
        if int(source.get("NumberOfFrames") or 1) > 1:
            image.ReferencedFrameNumber = item.frame + 1
        found.append(image)
    return found


def _reference(data: Any, series: DicomSeries, images: list[Any]) -> Any:
    pydicom = pydicom_module()
    frame, study, referred = (pydicom.Dataset() for _ in range(3))
    referred.SeriesInstanceUID = series.uid
    referred.ContourImageSequence = images
    study.ReferencedSOPClassUID = _STUDY_CLASS
    study.ReferencedSOPInstanceUID = data.StudyInstanceUID
    study.RTReferencedSeriesSequence = [referred]
    frame.FrameOfReferenceUID = data.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _roi(frame: str, number: int, segment: Segment) -> Any:
    roi = pydicom_module().Dataset()
    roi.ROINumber, roi.ROIName = number, segment.name[:64]
    roi.ReferencedFrameOfReferenceUID = frame
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    return roi


def _observation(number: int, segment: Segment) -> Any:
    data, code = (pydicom_module().Dataset() for _ in range(2))
    data.ObservationNumber = data.ReferencedROINumber = number
    data.RTROIInterpretedType = "ORGAN" if segment.category == ANATOMY else ""
    data.ROIInterpreter = ""
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = segment.kind
    data.RTROIIdentificationCodeSequence = [code]
    return data


def _drawn(
    number: int,
    segment: Segment,
    mask: Array,
    series: DicomSeries,
    images: list[Any],
) -> Any:
    """Give all contours of one segment."""
    roi = pydicom_module().Dataset()
    roi.ReferencedROINumber, roi.ROIDisplayColor = number, list(segment.color)
    roi.ContourSequence = [
        _contour(points, index, series.affine, images[index])
        for index in np.flatnonzero(mask.any(axis=(0, 1))).tolist()
        for points in contours(mask[..., index])
    ]
    return roi


def _contour(points: FloatArray, index: int, affine: FloatArray, image: Any) -> Any:
    data = pydicom_module().Dataset()
    ones = np.ones(len(points))
    places = np.column_stack([points, index * ones, ones]) @ affine.T
    places = places[:, :3] * (-1, -1, 1)  # RAS to LPS
    data.ContourImageSequence = [image]
    data.ContourGeometricType = "CLOSED_PLANAR"
    data.NumberOfContourPoints = len(points)
    data.ContourData = [f"{mm:.{_DECIMALS}f}" for mm in places.ravel()]
    return data
