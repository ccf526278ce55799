"""Voxels of DICOM in every transfer syntax that can be decoded."""

from __future__ import annotations

import io
from pathlib import Path

import dicom_series as make
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from segmamba.errors import BackendUnavailableError, FormatError
from segmamba.io import read_dicom


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_uncompressed_slices_are_read(tmp_path: Path, syntax: UID) -> None:
    stored = make.voxels().astype(np.uint16)
    group = make.datasets(stored)
    for data in group:
        data.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            swapped = np.frombuffer(data.PixelData, np.uint16).byteswap()
            data.PixelData = swapped.tobytes()
    make.write(tmp_path, group)
    np.testing.assert_array_equal(read_dicom(tmp_path).array[0], stored.T)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1]
)
def test_compressed_slices_are_read(tmp_path: Path, syntax: UID) -> None:
    stored = np.random.default_rng(0).integers(0, 4000, (3, 32, 40)).astype(np.uint16)
    group = make.datasets(stored)
    for data in group:
        compress(data, syntax, tmp_path / "one.dcm")
    make.write(tmp_path / "series", group)
    np.testing.assert_array_equal(read_dicom(tmp_path / "series").array[0], stored.T)


def compress(data: Dataset, syntax: UID, scratch: Path) -> None:
    """Compress with pydicom; JPEG and JPEG 2000 with ITK."""
    if syntax in (RLELossless, JPEGLSLossless):
        data.compress(syntax)
        return
    plane = np.frombuffer(data.PixelData, np.uint16).reshape(data.Rows, data.Columns)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(scratch))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000" if syntax == JPEG2000Lossless else "JPEG")
    writer.Execute(sitk.GetImageFromArray(plane))
    made = dcmread(scratch)
    assert made.file_meta.TransferSyntaxUID == syntax
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = made.PixelData
    data["PixelData"].is_undefined_length = True


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEGLosslessSV1])
def test_damage_that_ends_gdcm_is_refused(tmp_path: Path, syntax: UID) -> None:
    group = make.datasets(make.voxels().astype(np.uint16))
    for data in group:
        compress(data, syntax, tmp_path / "one.dcm")
    stream = bytearray(group[2].PixelData)
    for place in range(stream.index(b"\xff\xd8") + 2, len(stream), 7):
        stream[place] ^= 0xA5
    group[2].PixelData = bytes(stream)
    make.write(tmp_path / "series", group)
    with pytest.raises(FormatError, match="can't read a DICOM file"):
        read_dicom(tmp_path / "series")


def test_lossy_slices_are_read_as_they_were_kept(tmp_path: Path) -> None:
    grid = np.add.outer(np.arange(32), np.arange(40))
    stored = np.stack([100 + 50 * np.sin((grid + k) / 9) for k in range(3)])
    group = make.datasets(stored.astype(np.uint8), BitsStored=8, HighBit=7)
    for data in group:
        data.BitsAllocated, data.PixelRepresentation = 8, 0
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        plane = np.frombuffer(data.PixelData, np.uint8).reshape(32, 40)
        stream = io.BytesIO()
        Image.fromarray(plane).save(stream, "JPEG", quality=95)
        data.PixelData = encapsulate([stream.getvalue()])
        data["PixelData"].is_undefined_length = True
    make.write(tmp_path, group)
    np.testing.assert_allclose(read_dicom(tmp_path).array[0], stored.T, atol=3)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, JPEGExtended12Bit])
def test_what_no_library_of_ours_decodes_says_what_to_do(
    tmp_path: Path, syntax: UID
) -> None:
    group = make.datasets(make.voxels().astype(np.uint16), BitsStored=12, HighBit=11)
    for data in group:
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = encapsulate([data.PixelData])
        data["PixelData"].is_undefined_length = True
    make.write(tmp_path, group)
    with pytest.raises(BackendUnavailableError, match=r"12 bits.*uncompressed"):
        read_dicom(tmp_path)
