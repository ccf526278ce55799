"""Tiny DICOM series, made by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

SHAPE = (5, 4, 6)
"""Slices, rows, columns."""
SPACING = (2.5, 1.5, 0.75)
"""Slices, rows, columns in mm."""
TILT = np.radians(11)
ROW = np.array([1.0, 0.0, 0.0])
COLUMN = np.array([0.0, np.cos(TILT), np.sin(TILT)])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN = np.array([-12.0, 7.0, 30.0])
STUDY, FRAME = generate_uid(), generate_uid()


def voxels(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 3000, SHAPE).astype(np.int16)


def datasets(
    stored: np.ndarray[Any, Any] | None = None,
    *,
    number: int = 3,
    description: str = "T1 ax",
    study: str = STUDY,
    **tags: Any,
) -> list[Dataset]:
    """One data set for each slice, tilted as real head scans are."""
    stored = voxels() if stored is None else stored
    series = generate_uid()
    found = []
    for k, plane in enumerate(stored):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = MRImageStorage
        data.SOPInstanceUID = generate_uid()
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = study, series
        data.FrameOfReferenceUID = FRAME
        data.PatientID, data.PatientName = "1", "Phantom"
        data.Modality, data.SeriesNumber = "MR", number
        data.SeriesDescription, data.InstanceNumber = description, k + 1
        place(data, ORIGIN + k * SPACING[0] * NORMAL)
        data.ImageOrientationPatient = [round(float(v), 10) for v in (*ROW, *COLUMN)]
        data.PixelSpacing = [SPACING[1], SPACING[2]]
        data.SliceThickness = SPACING[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.Rows, data.Columns = plane.shape
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation = int(stored.dtype.kind == "i")
        data.PixelData = plane.tobytes()
        for tag, value in tags.items():
            setattr(data, tag, value)
        found.append(data)
    return found


def place(data: Dataset, position: np.ndarray[Any, Any]) -> None:
    data.ImagePositionPatient = [round(float(value), 10) for value in position]


def write(folder: Path, group: list[Dataset], start: str = "") -> Path:
    """Write slices under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(group):
        path = folder / f"{start}{(k * 7 + 3) % 11:02d}_{k}.dcm"
        data.save_as(path, enforce_file_format=True)
    return folder


def multi_frame(stored: np.ndarray[Any, Any], order: list[int]) -> Dataset:
    """An enhanced MR file whose frames lie in any order."""
    from pydicom.uid import EnhancedMRImageStorage

    data = datasets(stored)[0]
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    data.NumberOfFrames = len(order)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = data.PixelSpacing, SPACING[0]
    orientation.ImageOrientationPatient = data.ImageOrientationPatient
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [orientation]
    data.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for k in order:
        group, position, values = Dataset(), Dataset(), Dataset()
        place(position, ORIGIN + k * SPACING[0] * NORMAL)
        values.RescaleSlope, values.RescaleIntercept = 2, k
        values.RescaleType = "US"
        group.PlanePositionSequence = [position]
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = groups
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(data, tag)
    data.PixelData = stored[order].tobytes()
    return data
