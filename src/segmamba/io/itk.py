"""NRRD and MHA by SimpleITK, brought to (C, I, J, K) and RAS+."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import SimpleITK as sitk

from segmamba.errors import FormatError, GeometryError, describe
from segmamba.io.formats import MAX_INFLATION, Format, TruncatedFileError
from segmamba.io.geometry import checked_affine
from segmamba.types import Array, FloatArray, Size3

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_READERS = {"nrrd": "NrrdImageIO", "mha": "MetaImageIO"}
_NRRD_BYTES = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "int32", "uint32", "float"), 4),
    **dict.fromkeys(("longlong", "ulonglong", "int64", "uint64", "double"), 8),
}
_MHA_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "FLOAT": 4, "DOUBLE": 8}


@dataclass(frozen=True)
class ItkHeader:
    """What SimpleITK says of a file before its voxels are read."""

    shape: Size3
    channels: int
    affine: FloatArray
    dtype: np.dtype[Any]


def read_itk_header(path: Path, kind: Format, head: bytes) -> ItkHeader:
    """Read the header of an NRRD or MHA file.

    Args:
        path: The file.
        kind: "nrrd" or "mha".
        head: Its first bytes.

    Returns:
        The header, in RAS+.

    Raises:
        FormatError: The header is broken, claims more voxels than the file can hold,
            or keeps them in another file.
        GeometryError: The axes or spacings can't place voxels.
    """
    fields = _header_fields(kind, head)
    _refuse_detached(path, kind, fields)
    _check_size(path, kind, fields)
    _check_spacing(path, fields)
    reader = _reader(path, kind)
    with _itk_errors(path):
        reader.ReadImageInformation()
    size = reader.GetSize()
    components = reader.GetNumberOfComponents()
    extra = math.prod(size[3:])
    dtype = _numpy_type(path, reader)
    if len(size) < 3 or (components > 1 and extra > 1) or len(size) > 4:
        raise _bad(path, "three axes, and perhaps one of channels", f"size {size}")
    return ItkHeader(
        shape=cast(Size3, tuple(size[:3])),
        channels=components * extra,
        affine=_affine(path, reader, len(size)),
        dtype=dtype,
    )


def read_itk(path: Path, kind: Format) -> Array:
    """Read the voxels of an NRRD or MHA file.

    Args:
        path: The file.
        kind: "nrrd" or "mha".

    Returns:
        (C, I, J, K); the first spatial axis lies densest in memory.

    Raises:
        FormatError: The file ends early or is damaged.
    """
    with _itk_errors(path):
        image = _reader(path, kind).Execute()
        array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0).copy()
    elif array.ndim == 3:
        array = array[None]
    return array.reshape(-1, *array.shape[-3:]).transpose(0, 3, 2, 1)


def write_itk(path: Path, array: Array, affine: FloatArray) -> None:
    """Write an NRRD or MHA file, compressed.

    Args:
        path: The file; its ending chooses the format.
        array: (C, I, J, K); more than one channel become a vector image.
        affine: (4, 4), RAS+, mm.

    Raises:
        FormatError: The file can't be written.
    """
    voxels = np.ascontiguousarray(array.transpose(3, 2, 1, 0))
    if array.shape[0] == 1:
        image = sitk.GetImageFromArray(voxels[..., 0])
    else:
        image = sitk.GetImageFromArray(voxels, isVector=True)
    lps = _LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetOrigin([float(x) for x in lps[:3, 3]])
    image.SetSpacing([float(x) for x in spacing])
    image.SetDirection([float(x) for x in (lps[:3, :3] / spacing).ravel()])
    with _itk_errors(path):
        sitk.WriteImage(image, str(path), useCompression=True)


def _header_fields(kind: Format, head: bytes) -> dict[str, str]:
    """Give the header's lines as names in small letters and values."""
    text = head.decode("latin-1")
    if kind == "nrrd":
        text = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
        pairs = re.findall(r"^([^#:\r\n]+):[ =]([^\r\n]*)", text, re.MULTILINE)
    else:
        last = re.search(r"^ElementDataFile[^\n]*", text, re.MULTILINE)
        text = text[: last.end()] if last else text
        pairs = re.findall(r"^(\w+) *=([^\r\n]*)", text, re.MULTILINE)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _refuse_detached(path: Path, kind: Format, fields: dict[str, str]) -> None:
    if kind == "nrrd":
        outside = fields.get("data file", fields.get("datafile"))
    else:
        name = fields.get("elementdatafile", "LOCAL")
        outside = None if name.upper() == "LOCAL" else name
    if outside is not None:
        raise _bad(path, "header and voxels in one file", f"voxels in {outside}")


def _check_size(path: Path, kind: Format, fields: dict[str, str]) -> None:
    """Refuse a header that claims more than the file can hold, before reading."""
    try:
        claimed, compressed = _claimed_bytes(kind, fields)
    except (KeyError, ValueError) as error:
        raise _bad(path, "sizes and a number type", f"no usable {error}") from error
    found = path.stat().st_size * (MAX_INFLATION if compressed else 1)
    if found < claimed:
        raise TruncatedFileError(
            describe(
                "a scan is truncated",
                expected=f"{claimed} bytes by its header",
                found=f"{path.stat().st_size} bytes",
                file=path,
                remedy="Copy or download the file again.",
            )
        )


def _claimed_bytes(kind: Format, fields: dict[str, str]) -> tuple[int, bool]:
    if kind == "nrrd":
        sizes = [int(n) for n in fields["sizes"].split()]
        width = _nrrd_width(fields["type"])
        compressed = fields.get("encoding", "raw").lower() not in ("raw",)
    else:
        sizes = [int(n) for n in fields["dimsize"].split()]
        sizes.append(int(fields.get("elementnumberofchannels", "1")))
        name = fields["elementtype"].upper().removeprefix("MET_")
        width = _MHA_BYTES.get(name.removesuffix("_ARRAY").removeprefix("U"), 1)
        compressed = fields.get("compresseddata", "false").lower() == "true"
    if min(sizes) < 1:
        raise ValueError(f"sizes {sizes}")
    return math.prod(sizes) * width, compressed


def _nrrd_width(name: str) -> int:
    """Give the bytes of a number type in any of NRRD's spellings."""
    name = (
        name.lower()
        .removesuffix("_t")
        .removesuffix(" int")
        .replace("long long", "longlong")
    )
    words = [word for word in name.split() if word not in ("signed", "unsigned")]
    return _NRRD_BYTES["".join(words) or "int"]


def _check_spacing(path: Path, fields: dict[str, str]) -> None:
    """Refuse spacings of 0 or NaN, which the reader would replace silently."""
    text = fields.get("elementspacing", fields.get("elementsize", ""))
    text = text or fields.get("spacings", "")
    for word in text.split():
        with contextlib.suppress(ValueError):
            value = float(word)
            if value == 0 or (not math.isfinite(value) and "spacings" not in fields):
                raise GeometryError(
                    describe(
                        "bad spacing",
                        expected="finite numbers above 0",
                        found=text,
                        file=path,
                    )
                )
    if re.search(r"\(\s*0*\.?0*\s*(,\s*0*\.?0*\s*){2}\)", _directions(fields)):
        raise GeometryError(
            describe(
                "the affine is singular",
                expected="three independent axes",
                found=_directions(fields),
                file=path,
            )
        )


def _directions(fields: dict[str, str]) -> str:
    return fields.get("space directions", "")


def _reader(path: Path, kind: Format) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[kind])
    reader.SetFileName(str(path))
    return reader


def _numpy_type(path: Path, reader: sitk.ImageFileReader) -> np.dtype[Any]:
    name = sitk.GetPixelIDValueAsString(reader.GetPixelID()).lower()
    match = re.search(r"(\d+)-bit (signed|unsigned|float)", name)
    if match is None or "complex" in name:
        raise _bad(path, "integers or real numbers", name)
    kind = {"signed": "i", "unsigned": "u", "float": "f"}[match.group(2)]
    return np.dtype(f"{kind}{int(match.group(1)) // 8}")


def _affine(path: Path, reader: sitk.ImageFileReader, num_axes: int) -> FloatArray:
    direction = np.array(reader.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
    affine[:3, 3] = np.array(reader.GetOrigin())[:3]
    return checked_affine(_LPS_TO_RAS @ affine, path)


@contextlib.contextmanager
def _itk_errors(path: Path) -> Iterator[None]:
    """Keep ITK's warnings off the screen and turn its exceptions into ours."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _bad(path, "a whole NRRD or MHA file", lines[-1]) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _bad(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        describe(
            "can't use a scan",
            expected=expected,
            found=found,
            file=path,
            remedy="Convert the file from its source again.",
        )
    )
