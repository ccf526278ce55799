"""MetaImage in one file (.mha), as ITK writes it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from isal import isal_zlib

from segmamba.errors import SegMambaError
from segmamba.io.geometry import checked_affine
from segmamba.io.inflation import ZLIB
from segmamba.io.texthead import (
    LPS_TO_RAS,
    TextHeader,
    bad_text_header,
    check_text_size,
    join_numbers,
    numbers,
    read_text_head,
)
from segmamba.types import Array, FloatArray

_CODES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_NAMES = {code: name for name, code in _CODES.items() if "LONG" not in name} | {
    "i8": "MET_LONG_LONG",
    "u8": "MET_ULONG_LONG",
}
_LAST_FIELD = b"ElementDataFile"


def read_metaimage_header(path: Path) -> TextHeader:
    """Read the header of an MHA file.

    Args:
        path: The file.

    Returns:
        The header, in RAS+.

    Raises:
        FormatError: The header is broken, claims more voxels than the file can hold,
            or keeps them in another file.
        GeometryError: The axes or spacings can't place voxels.
    """
    head = read_text_head(path, _LAST_FIELD)
    match = re.search(rb"^ElementDataFile[^\n]*\n", head, re.MULTILINE)
    if match is None:
        raise bad_text_header(path, "a line ElementDataFile", "its beginning only")
    text = head[: match.end()].decode("latin-1")
    pairs = re.findall(r"^(\w+) *=([^\r\n]*)", text, re.MULTILINE)
    fields = {name.lower(): value.strip() for name, value in pairs}
    if fields.get("elementdatafile", "").upper() != "LOCAL":
        raise bad_text_header(path, "header and voxels in one file", "them apart")
    try:
        header = _parse(path, fields, match.end())
    except SegMambaError:
        raise
    except (KeyError, ValueError, IndexError, OverflowError) as error:
        found = f"an unusable one ({type(error).__name__}: {error})"
        raise bad_text_header(path, "a valid MHA header", found) from error
    check_text_size(path, header)
    return header


def _parse(path: Path, fields: dict[str, str], end: int) -> TextHeader:
    sizes = tuple(int(word) for word in fields["dimsize"].split())
    channels = int(fields.get("elementnumberofchannels", "1"))
    several = channels != 1
    if len(sizes) != int(fields["ndims"]) or len(sizes) + several not in (3, 4):
        raise bad_text_header(path, "three axes, and perhaps one of channels", sizes)
    if min(*sizes, channels) < 1 or len(sizes) < 3:
        raise bad_text_header(path, "three axes of one voxel or more", sizes)
    if not _is_true(fields.get("binarydata", "true")):
        raise bad_text_header(path, "binary voxels", "text")
    order = ">" if _is_true(_first(fields, _BYTE_ORDERS, "false")) else "<"
    name = fields["elementtype"].upper().removesuffix("_ARRAY")
    return TextHeader(
        sizes=(channels, *sizes) if several else sizes,
        channel_axis=0 if several else (3 if len(sizes) == 4 else None),
        affine=checked_affine(_affine(fields, len(sizes)), path),
        dtype=np.dtype(order + _CODES[name]),
        offset=-1 if fields.get("headersize") == "-1" else end,
        compressed=_is_true(fields.get("compresseddata", "false")),
    )


_BYTE_ORDERS = ("binarydatabyteordermsb", "elementbyteordermsb")
_SPACINGS = ("elementspacing", "elementsize")
_MATRICES = ("transformmatrix", "rotation", "orientation")
_ORIGINS = ("offset", "position", "origin")


def _first(fields: dict[str, str], names: tuple[str, ...], default: str) -> str:
    return next((fields[name] for name in names if name in fields), default)


def _is_true(text: str) -> bool:
    return text.lower() in ("true", "1", "t")


def _affine(fields: dict[str, str], num_axes: int) -> FloatArray:
    """Compose the affine; row n of TransformMatrix is the direction of axis n."""
    ones, zeros = " ".join("1" * num_axes), " ".join("0" * num_axes)
    unit = " ".join(str(float(x)) for x in np.eye(num_axes).ravel())
    matrix = np.array(numbers(_first(fields, _MATRICES, unit)))
    spacing = np.array(numbers(_first(fields, _SPACINGS, ones)))
    origin = np.array(numbers(_first(fields, _ORIGINS, zeros)))
    if (matrix.size, spacing.size, origin.size) != (num_axes**2, num_axes, num_axes):
        raise ValueError("numbers of TransformMatrix, ElementSpacing or Offset")
    affine = np.eye(4)
    affine[:3, :3] = matrix.reshape(num_axes, num_axes)[:3, :3].T * spacing[:3]
    affine[:3, 3] = origin[:3]
    return LPS_TO_RAS @ affine


def write_metaimage(path: Path, array: Array, affine: FloatArray) -> None:
    """Write an MHA file, compressed.

    Args:
        path: The file.
        array: (C, I, J, K); more than one channel become vectors.
        affine: (4, 4), RAS+, mm.
    """
    voxels = array.transpose(3, 2, 1, 0).astype(array.dtype.newbyteorder("<"))
    body = isal_zlib.compress(voxels.tobytes(), wbits=ZLIB)
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(body)}",
        f"TransformMatrix = {join_numbers((lps[:3, :3] / spacing).T.ravel())}",
        f"Offset = {join_numbers(lps[:3, 3])}",
        "CenterOfRotation = 0 0 0",
        f"ElementSpacing = {join_numbers(spacing)}",
        "DimSize = " + " ".join(str(size) for size in array.shape[1:]),
        *([f"ElementNumberOfChannels = {len(array)}"] if len(array) > 1 else []),
        f"ElementType = {_NAMES[array.dtype.str[1:]]}",
        "ElementDataFile = LOCAL",
    ]
    path.write_bytes(("\n".join(lines) + "\n").encode("ascii") + body)
