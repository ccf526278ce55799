"""NRRD (teem.sourceforge.net/nrrd/format.html): raw or gzip voxels in one file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from isal import isal_zlib

from segmamba.io.geometry import checked_affine, checked_sizes
from segmamba.io.inflation import GZIP
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

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64"),
    "f4": ("float",),
    "f8": ("double",),
}
_CODES = {name: code for code, names in _TYPES.items() for name in names} | {
    "int16_t": "i2",
    "int64_t": "i8",
    "uint64_t": "u8",
    "signed long long int": "i8",
}
_NAMES = {code: names[-1].removesuffix("_t") for code, names in _TYPES.items()}
_RAS = ("right-anterior-superior", "ras")
_LAS = ("left-anterior-superior", "las")
_DOMAINS = ("domain", "space")


def read_nrrd_header(path: Path) -> TextHeader:
    """Read the header of an NRRD file.

    Args:
        path: The file.

    Returns:
        The header, in RAS+. A space that is not named counts as LPS, as in ITK.

    Raises:
        FormatError: The header is broken, claims more voxels than the file can hold,
            or keeps them in another file.
        GeometryError: The axes can't place voxels.
    """
    head = read_text_head(path, b"\n\n")
    match = re.search(rb"\r?\n\r?\n", head)
    end = match.end() if match else len(head)
    text = head[:end].decode("latin-1")
    pairs = re.findall(r"^([^#:\r\n]+): ([^\r\n]*)", text, re.MULTILINE)
    fields = {name.strip().lower(): value.strip() for name, value in pairs}
    if "data file" in fields or "datafile" in fields:
        raise bad_text_header(path, "header and voxels in one file", "them apart")
    with parsing(path, "NRRD"):
        header = _parse(path, fields, head, end)
    check_text_size(path, header)
    return header


def _parse(path: Path, fields: dict[str, str], head: bytes, end: int) -> TextHeader:
    sizes = tuple(int(word) for word in fields["sizes"].split())
    channel_axis = _channel_axis(fields, len(sizes))
    num_spatial = len(sizes) - (channel_axis is not None)
    if num_spatial != 3 or min(sizes) < 1 or len(sizes) != int(fields["dimension"]):
        raise bad_text_header(path, "three axes, and perhaps one of channels", sizes)
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise bad_text_header(path, "encoding raw or gzip", encoding)
    order = {"little": "<", "big": ">"}[fields.get("endian", "little").lower()]
    name = " ".join(fields["type"].lower().split())
    return TextHeader(
        sizes=sizes,
        channel_axis=channel_axis,
        affine=checked_affine(_affine(path, fields, len(sizes), channel_axis), path),
        dtype=np.dtype(order + _CODES[name]),
        offset=_offset(fields, head, end),
        compressed=encoding != "raw",
        voxels=path,
    )


def _offset(fields: dict[str, str], head: bytes, end: int) -> int:
    """Give where the voxels begin, after lines and bytes that are to be skipped."""
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if skip == -1:
        return -1
    for _ in range(int(fields.get("line skip", fields.get("lineskip", "0")))):
        end = head.index(b"\n", end) + 1
    if skip < 0:
        raise ValueError(f"byte skip {skip}")
    return end + skip


def _directions(fields: dict[str, str]) -> list[list[float] | None]:
    """Read vectors such as (1,0,0); "none" stands for an axis that isn't spatial."""
    words = re.findall(r"\([^)]*\)|\bnone\b", fields["space directions"])
    return [
        None if word == "none" else [float(x) for x in word.strip("()").split(",")]
        for word in words
    ]


def _channel_axis(fields: dict[str, str], num_axes: int) -> int | None:
    """Tell which of four axes counts channels: the last, if nothing says otherwise."""
    if num_axes != 4:
        return None
    if "space directions" in fields:
        directions = _directions(fields)
        if None in directions:
            return directions.index(None)
    kinds = fields.get("kinds", "").lower().split()
    others = [axis for axis, kind in enumerate(kinds) if kind not in _DOMAINS]
    return others[0] if len(others) == 1 and others[0] < 4 else 3


def _affine(
    path: Path, fields: dict[str, str], num_axes: int, channel_axis: int | None
) -> FloatArray:
    axes = [axis for axis in range(num_axes) if axis != channel_axis]
    affine = np.eye(4)
    if "space directions" in fields:
        directions = _directions(fields)
        for column, axis in enumerate(axes):
            vector = directions[axis]
            if vector is None or len(vector) < 3:
                raise ValueError(f"space directions {fields['space directions']}")
            affine[:3, column] = vector[:3]
    elif "spacings" in fields:
        spacings = numbers(fields["spacings"])
        sizes = checked_sizes([spacings[axis] for axis in axes], path)
        affine[:3, :3] = np.diag(sizes)
    if "space origin" in fields:
        origin = fields["space origin"].strip("()").split(",")
        affine[:3, 3] = [float(word) for word in origin][:3]
    space = fields.get("space", "").lower().removesuffix("-time").removesuffix("t")
    if space in _RAS:
        return affine
    if space in _LAS:
        return np.diag([-1.0, 1.0, 1.0, 1.0]) @ affine
    return LPS_TO_RAS @ affine


def write_nrrd(path: Path, array: Array, affine: FloatArray) -> None:
    """Write an NRRD file, gzip inside.

    Args:
        path: The file.
        array: (C, I, J, K); more than one channel become a vector axis.
        affine: (4, 4), RAS+, mm.
    """
    several = array.shape[0] > 1
    voxels = array.transpose(3, 2, 1, 0).astype(array.dtype.newbyteorder("<"))
    lps = LPS_TO_RAS @ affine
    vectors = [f"({join_numbers(lps[:3, axis], ',')})" for axis in range(3)]
    sizes = [*([array.shape[0]] if several else []), *array.shape[1:]]
    lines = [
        "NRRD0004",
        f"type: {_NAMES[array.dtype.str[1:]]}",
        f"dimension: {len(sizes)}",
        "space: left-posterior-superior",
        "sizes: " + " ".join(str(size) for size in sizes),
        "space directions: " + " ".join([*(["none"] if several else []), *vectors]),
        "kinds:" + " vector" * several + " domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: ({join_numbers(lps[:3, 3], ',')})",
    ]
    head = "\n".join(lines) + "\n\n"
    body = isal_zlib.compress(voxels.tobytes(), wbits=GZIP)
    path.write_bytes(head.encode("ascii") + body)
