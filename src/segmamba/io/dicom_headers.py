"""What a DICOM file's header says of each of its slices."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from segmamba.errors import BackendUnavailableError, FormatError, describe
from segmamba.io.dicom_files import DicomFile

INSTALL = "Run: pip install 'segmamba[dicom]'"
"""The remedy where a DICOM library is missing."""

_NO_SCANS = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC")
"""Modalities of files that may lie beside a scan and are none."""


@dataclass(frozen=True)
class Slice:
    """One slice of a series: a file, or a frame of one."""

    file: DicomFile
    frame: int
    """Index of the frame in the file; 0 in files of one slice."""
    position: tuple[float, ...] | None
    """Centre of the first voxel, LPS+ mm; None if the header doesn't say."""
    orientation: tuple[float, ...] | None
    """Directions of growing column and row index, LPS+: 6 cosines."""
    pixel_spacing: tuple[float, ...] | None
    """Distance between rows, and between columns, in mm."""
    size: tuple[int, int]
    """Rows and columns."""
    slope: float = 1.0
    intercept: float = 0.0
    number: int | None = None
    """InstanceNumber."""

    @property
    def label(self) -> str:
        """What error texts call it."""
        frames = f" frame {self.frame + 1}" if self.frame else ""
        return f"{self.file.name}{frames}"


@dataclass(frozen=True)
class Header:
    """A file's identity, and its slices."""

    uid: str
    """SeriesInstanceUID."""
    study: str
    patient: str
    reference: str
    """FrameOfReferenceUID: what positions refer to."""
    number: int | None
    description: str
    modality: str
    thickness: float | None
    """Distance to the next slice that the header states, in mm."""
    slices: tuple[Slice, ...]
    acquired: int | None = None
    """ImagesInAcquisition: how many slices were taken, if the header says so."""
    problem: str | None = None
    """Why its voxels can't be intensities; a screenshot must not spoil a study."""


def pydicom_module() -> Any:
    """Import pydicom.

    Raises:
        BackendUnavailableError: It isn't installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise missing_library("pydicom") from error
    return pydicom


def missing_library(name: str, remedy: str = INSTALL) -> BackendUnavailableError:
    """Compose the error for a library that isn't there."""
    return BackendUnavailableError(
        describe(f"DICOM needs {name}, which is not installed", remedy=remedy)
    )


@contextlib.contextmanager
def reading(file: DicomFile | str) -> Iterator[None]:
    """Turn whatever a DICOM library raises into one error; hush its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (FormatError, BackendUnavailableError):
        raise
    except Exception as error:  # the libraries raise nearly every type there is
        raise FormatError(
            describe(
                "can't read a DICOM file",
                expected="a whole image",
                found=f"{type(error).__name__} ({str(error)[:300]})",
                file=str(file),
                remedy="Export or copy the series again.",
            )
        ) from error


def read_dataset(file: DicomFile, stream: IO[bytes]) -> Any:
    """Read a file's header, not its voxels.

    Raises:
        FormatError: It is damaged.
    """
    pydicom = pydicom_module()
    with reading(file):
        return pydicom.dcmread(stream, stop_before_pixels=True)


def read_header(file: DicomFile, stream: IO[bytes]) -> Header | None:
    """Read what is needed of a file's header.

    Args:
        file: Where it lies.
        stream: Its bytes.

    Returns:
        The header; None for a file that holds no scan (a report, a segmentation).

    Raises:
        FormatError: It is damaged.
    """
    data = read_dataset(file, stream)
    with reading(file):
        if not is_scan_header(data):
            return None
        return _header(data, file)


def is_scan_header(data: Any) -> bool:
    """Tell whether a data set is an image of voxels, no report and no segmentation."""
    return str(data.get("Modality", "")) not in _NO_SCANS and bool(data.get("Rows"))


def _header(data: Any, file: DicomFile) -> Header:
    return Header(
        uid=str(data.get("SeriesInstanceUID", "")),
        study=str(data.get("StudyInstanceUID", "")),
        patient=str(data.get("PatientID", "") or ""),
        reference=str(data.get("FrameOfReferenceUID", "") or ""),
        number=_integer(data.get("SeriesNumber")),
        description=str(data.get("SeriesDescription", "") or "").strip(),
        modality=str(data.get("Modality", "") or ""),
        thickness=_thickness(data),
        slices=tuple(_slices(data, file)),
        acquired=_integer(data.get("ImagesInAcquisition")),
        problem=_colours(data, file),
    )


def _slices(data: Any, file: DicomFile) -> Iterator[Slice]:
    frames = _integer(data.get("NumberOfFrames")) or 1
    groups = data.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        # Frames without a place of their own can only be named, not put in order.
        yield from (
            _slice(data, file, index, [data]) for index in range(min(frames, 2))
        )
        return
    if len(groups) != frames:
        raise FormatError(
            describe(
                "a multi-frame file contradicts itself",
                expected=f"{frames} frames",
                found=f"the places of {len(groups)}",
                file=str(file),
                remedy="Export the series again.",
            )
        )
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]
    for index, group in enumerate(groups):
        yield _slice(data, file, index, [group, *shared, data])


def _slice(data: Any, file: DicomFile, frame: int, places: Sequence[Any]) -> Slice:
    slope = _find(places, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _find(places, "PixelValueTransformationSequence", "RescaleIntercept")
    return Slice(
        file=file,
        frame=frame,
        position=_numbers(
            _find(places, "PlanePositionSequence", "ImagePositionPatient"), 3
        ),
        orientation=_numbers(
            _find(places, "PlaneOrientationSequence", "ImageOrientationPatient"), 6
        ),
        pixel_spacing=_numbers(
            _find(places, "PixelMeasuresSequence", "PixelSpacing"), 2
        ),
        size=(int(data.Rows), int(data.Columns)),
        # No slope can be 0: all voxels would be alike. GDCM and dcm2niix take 1 too.
        slope=1.0 if slope in (None, "") else _finite(slope) or 1.0,
        intercept=0.0 if intercept in (None, "") else _finite(intercept),
        number=_integer(data.get("InstanceNumber")),
    )


def _find(places: Sequence[Any], sequence: str, name: str) -> Any:
    """Find a tag in the frame's groups, then the shared ones, then the file's own."""
    for place in places:
        for item in [*(place.get(sequence) or [])[:1], place]:
            if item.get(name) is not None:
                return item.get(name)
    return None


def _thickness(data: Any) -> float | None:
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = _find([*shared, data], "PixelMeasuresSequence", name)
        if value not in (None, "") and _finite(value) > 0:
            return _finite(value)
    return None


def _colours(data: Any, file: DicomFile) -> str | None:
    samples = _integer(data.get("SamplesPerPixel")) or 1
    found = None
    if samples != 1 or str(data.get("PhotometricInterpretation")) == "PALETTE COLOR":
        found = f"{data.get('PhotometricInterpretation')}, {samples} numbers a voxel"
    elif data.get("ModalityLUTSequence"):
        found = "a table of values (Modality LUT) in place of slope and intercept"
    if found is None:
        return None
    return describe(
        "can't take the voxels of a DICOM file as intensities",
        expected="one number a voxel, with slope and intercept",
        found=found,
        file=str(file),
        remedy="Leave this series out; choose another with --series.",
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if value is None or isinstance(value, (str, float)) or len(value) != count:
        return None
    return tuple(_finite(number) for number in value)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a number that is not finite: {value}")
    return number


def _integer(value: Any) -> int | None:
    return None if value in (None, "") else int(value)
