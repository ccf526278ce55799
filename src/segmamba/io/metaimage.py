"""MetaImage in one file (.mha) or two (.mhd and its voxels), as ITK writes it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from isal import isal_zlib

from segmamba.atomic import atomic_path, flush_file
from segmamba.io.geometry import checked_affine, checked_sizes
from segmamba.io.inflation import ZLIB
from segmamba.io.texthead import (
    LPS_TO_RAS,
    TextHeader,
    bad_text_header,
    check_text_size,
    join_numbers,
    numbers,
    parsing,
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
    """Read the header of an MHA or MHD file.

    Args:
        path: The file.

    Returns:
        The header, in RAS+.

    Raises:
        FormatError: The header is broken, claims more voxels than the file can hold,
            or keeps them elsewhere than in one file beside it.
        GeometryError: The axes or spacings can't place voxels.
    """
    head = read_text_head(path, _LAST_FIELD)
    match = re.search(rb"^ElementDataFile[^\n]*(\n|\Z)", head, re.MULTILINE)
    if match is None:
        raise bad_text_header(path, "a line ElementDataFile", "its beginning only")
    text = head[: match.end()].decode("latin-1")
    pairs = re.findall(r"^(\w+) *=([^\r\n]*)", text, re.MULTILINE)
    fields = {name.lower(): value.strip() for name, value in pairs}
    voxels = _voxels_file(path, fields.get("elementdatafile", ""))
    end = match.end() if voxels == path else 0
    with parsing(path, "MHA"):
        header = _parse(path, fields, voxels, end)
    check_text_size(path, header)
    return header


def _voxels_file(path: Path, name: str) -> Path:
    """Find the file of the voxels; one that lies elsewhere is no part of the scan."""
    if name.upper() == "LOCAL":
        return path
    name = name.encode("latin-1").decode("utf-8", "replace")
    several = name.upper().startswith("LIST") or "%" in name
    elsewhere = (
        set(name) & set("/\\:\0") or name in (".", "..") or len(name.encode()) > 255
    )
    if not name or several or elsewhere:
        raise bad_text_header(path, "voxels in one file in the same folder", repr(name))
    if not path.with_name(name).is_file():
        raise bad_text_header(path, f"the voxels in {name} beside it", "no such file")
    return path.with_name(name)


def _parse(path: Path, fields: dict[str, str], voxels: Path, end: int) -> TextHeader:
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
        affine=checked_affine(_affine(path, fields, len(sizes)), path),
        dtype=np.dtype(order + _CODES[name]),
        offset=_offset(fields.get("headersize", "0"), end),
        compressed=_is_true(fields.get("compresseddata", "false")),
        voxels=voxels,
    )


def _offset(header_size: str, end: int) -> int:
    """Give where the voxels begin in their file; -1 means that they end with it."""
    size = int(header_size)
    if size < -1:
        raise ValueError(f"HeaderSize {size}")
    return size or end


_BYTE_ORDERS = ("binarydatabyteordermsb", "elementbyteordermsb")
_SPACINGS = ("elementspacing", "elementsize")
_MATRICES = ("transformmatrix", "rotation", "orientation")
_ORIGINS = ("offset", "position", "origin")


def _first(fields: dict[str, str], names: tuple[str, ...], default: str) -> str:
    return next((fields[name] for name in names if name in fields), default)


def _is_true(text: str) -> bool:
    return text.lower() in ("true", "1", "t")


def _affine(path: Path, fields: dict[str, str], num_axes: int) -> FloatArray:
    """Compose the affine; row n of TransformMatrix is the direction of axis n."""
    ones, zeros = " ".join("1" * num_axes), " ".join("0" * num_axes)
    unit = " ".join(str(float(x)) for x in np.eye(num_axes).ravel())
    matrix = np.array(numbers(_first(fields, _MATRICES, unit)))
    spacing = np.array(numbers(_first(fields, _SPACINGS, ones)))
    origin = np.array(numbers(_first(fields, _ORIGINS, zeros)))
    if (matrix.size, spacing.size, origin.size) != (num_axes**2, num_axes, num_axes):
        raise ValueError("too few numbers of TransformMatrix, ElementSpacing or Offset")
    affine = np.eye(4)
    sizes = checked_sizes(spacing[:3], path)
    affine[:3, :3] = matrix.reshape(num_axes, num_axes)[:3, :3].T * sizes
    affine[:3, 3] = origin[:3]
    return LPS_TO_RAS @ affine


def write_metaimage(path: Path, array: Array, affine: FloatArray) -> None:
    """Write an MHA file, compressed.

    Args:
        path: The file.
        array: (C, I, J, K); more than one channel become vectors.
        affine: (4, 4), RAS+, mm.
    """
    body = _compressed(array)
    path.write_bytes(_head(array, affine, len(body), "LOCAL") + body)


def write_metaimage_pair(
    path: Path, temporary: Path, array: Array, affine: FloatArray
) -> None:
    """Write an MHD header to a temporary path, and the voxels beside the final one.

    Args:
        path: The header's final path; the voxels get its name with the ending zraw.
        temporary: Where to write the header.
        array: (C, I, J, K); more than one channel become vectors.
        affine: (4, 4), RAS+, mm.
    """
    voxels, body = path.with_suffix(".zraw"), _compressed(array)
    with atomic_path(voxels) as file:
        file.write_bytes(body)
        temporary.write_bytes(_head(array, affine, len(body), voxels.name))
        flush_file(temporary)  # what may fail fails before the old voxels are gone


def _compressed(array: Array) -> bytes:
    voxels = array.transpose(3, 2, 1, 0).astype(array.dtype.newbyteorder("<"))
    return isal_zlib.compress(voxels.tobytes(), wbits=ZLIB)


def _head(array: Array, affine: FloatArray, num_bytes: int, file: str) -> bytes:
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {num_bytes}",
        f"TransformMatrix = {join_numbers((lps[:3, :3] / spacing).T.ravel())}",
        f"Offset = {join_numbers(lps[:3, 3])}",
        "CenterOfRotation = 0 0 0",
        f"ElementSpacing = {join_numbers(spacing)}",
        "DimSize = " + " ".join(str(size) for size in array.shape[1:]),
        *([f"ElementNumberOfChannels = {len(array)}"] if len(array) > 1 else []),
        f"ElementType = {_NAMES[array.dtype.str[1:]]}",
        f"ElementDataFile = {file}",
    ]
    return ("\n".join(lines) + "\n").encode()
