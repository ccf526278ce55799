"""Tell whether files that were written are there to their last byte."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from isal import igzip

from segmamba.errors import FormatError
from segmamba.io.dicom_headers import pydicom_module, reading

_CHUNK = 1 << 20
_UNDEFINED = 0xFFFFFFFF
_LAST_TAGS = ("PixelData", "ApprovalStatus")
"""What DICOM-SEG and RTSTRUCT end with, as they are written here."""


def is_whole(path: Path) -> bool:
    """Tell whether an output is whole; a power cut may leave a part of it.

    Args:
        path: A .nii.gz, or a DICOM-SEG or RTSTRUCT (.dcm).

    Returns:
        False if it is missing, cut off or damaged.
    """
    try:
        return _is_whole_dicom(path) if path.suffix == ".dcm" else _inflates(path)
    except (OSError, EOFError, zlib.error, igzip.BadGzipFile, FormatError):
        return False


def _inflates(path: Path) -> bool:
    """Read through to the checksum at the end, holding one piece at a time."""
    size = 0
    with igzip.open(path) as stream:
        while piece := stream.read(_CHUNK):
            size += len(piece)
    return size > 0


def _is_whole_dicom(path: Path) -> bool:
    with reading(str(path)):
        data = pydicom_module().dcmread(path)
        items = [data.get_item(tag) for tag in data.keys()]  # noqa: SIM118
    return any(tag in data for tag in _LAST_TAGS) and not any(map(_is_cut, items))


def _is_cut(item: Any) -> bool:
    """Tell whether a tag holds less than it states; pydicom takes what there is."""
    length = getattr(item, "length", None)
    return length not in (None, _UNDEFINED) and len(item.value or b"") < length
