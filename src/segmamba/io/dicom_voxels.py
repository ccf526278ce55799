"""Decode a series' voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segmamba.errors import FormatError, describe
from segmamba.io.dicom_files import DicomFile, open_files
from segmamba.io.dicom_headers import (
    INSTALL,
    Header,
    Slice,
    missing_library,
    pydicom_module,
    reading,
)
from segmamba.io.dicom_jpeg import check_jpeg
from segmamba.io.formats import MAX_INFLATION
from segmamba.types import Array

_JPEG_LS_PLUGIN = "pyjpegls"
_CONVERT = (
    "Have the series exported uncompressed; or pip install pylibjpeg and "
    "pylibjpeg-openjpeg (high throughput) or pylibjpeg-libjpeg (12 bits)."
)
"""The remedy for what the extra's libraries don't decode."""


def read_voxels(
    headers: Sequence[Header], slices: Sequence[Slice], dtype: np.dtype[Any]
) -> Array:
    """Read the voxels of a series.

    Args:
        headers: One for each file.
        slices: All slices of these files, in the order wanted.
        dtype: Number type of the result.

    Returns:
        (slices, rows, columns), slope and intercept applied in float64.

    Raises:
        FormatError: A file is damaged, or too small for the voxels that it claims.
        BackendUnavailableError: There is no decoder for a file's transfer syntax.
    """
    _check_claims(headers)
    places: dict[DicomFile, dict[int, int]] = {}
    for k, item in enumerate(slices):
        places.setdefault(item.file, {})[item.frame] = k
    array = np.empty((len(slices), *slices[0].size), dtype)
    for file, stream in open_files(list(places)):
        frames = sorted(places[file])
        for frame, stored in zip(frames, _decode(file, stream, frames), strict=True):
            k = places[file][frame]
            array[k] = _rescaled(stored, slices[k], dtype, file)
    return array


def _check_claims(headers: Sequence[Header]) -> None:
    """Refuse files that claim more voxels than so few bytes can hold."""
    for header in headers:
        rows, columns = header.slices[0].size
        file = header.slices[0].file
        claimed = rows * columns * len(header.slices)
        if claimed > file.size * MAX_INFLATION:
            raise FormatError(
                describe(
                    "a DICOM file is too small for its voxels",
                    expected=f"room for {claimed} voxels",
                    found=f"{file.size} bytes",
                    file=str(file),
                    remedy="Export or copy the series again.",
                )
            )


def _decode(file: DicomFile, stream: Any, frames: Sequence[int]) -> list[Array]:
    pydicom = pydicom_module()
    from pydicom.encaps import generate_frames
    from pydicom.pixels import iter_pixels, pixel_array  # pyright: ignore
    from pydicom.uid import JPEGTransferSyntaxes

    with reading(file):
        data = pydicom.dcmread(stream)
        plugin = _plugin(data)
        if data.file_meta.TransferSyntaxUID in JPEGTransferSyntaxes:
            count = int(data.get("NumberOfFrames") or 1)
            for part in generate_frames(data.PixelData, number_of_frames=count):
                check_jpeg(part, data.Rows, data.Columns, data.BitsAllocated)
        if int(data.get("NumberOfFrames") or 1) == 1:
            return [pixel_array(data, decoding_plugin=plugin)]
        return list(iter_pixels(data, indices=frames, decoding_plugin=plugin))


def _plugin(data: Any) -> str:
    """Name the decoder to take, or "" for pydicom's own choice.

    Raises:
        BackendUnavailableError: There is none for this transfer syntax.
    """
    syntax = data.file_meta.TransferSyntaxUID
    if not (syntax.is_compressed and syntax.is_encapsulated):
        return ""
    from pydicom.pixels import get_decoder  # pyright: ignore

    available = get_decoder(syntax).available_plugins
    rare = syntax.name.startswith("High-Throughput")
    if syntax.name.startswith("JPEG Extended") and data.BitsStored > 8:
        rare, available = True, [name for name in available if name == "pylibjpeg"]
    # On damaged JPEG-LS, GDCM ends the whole process.
    wanted = _JPEG_LS_PLUGIN if syntax.name.startswith("JPEG-LS") else ""
    if not available or (wanted and wanted not in available):
        what = f"a decoder for {syntax.name} of {data.BitsStored} bits"
        raise missing_library(what, _CONVERT if rare else INSTALL)
    return wanted


def _rescaled(
    stored: Array, item: Slice, dtype: np.dtype[Any], file: DicomFile
) -> Array:
    if stored.shape != item.size:
        raise FormatError(
            describe(
                "a slice is not of the size that its header states",
                expected=item.size,
                found=stored.shape,
                file=str(file),
            )
        )
    if (item.slope, item.intercept) == (1.0, 0.0):
        return stored.astype(dtype, copy=False)
    return (stored.astype(np.float64) * item.slope + item.intercept).astype(dtype)
