"""NIfTI-1 and -2, plain or gzip: header by nibabel, voxels by numpy and isal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from segmamba.errors import FormatError, SegMambaError, describe
from segmamba.io.formats import GZIP_MAGIC, TruncatedFileError
from segmamba.io.geometry import (
    checked_affine,
    checked_sizes,
    describe_grid_difference,
)
from segmamba.io.inflation import check_room, inflate
from segmamba.types import Array, FloatArray, Size3

_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_MM_PER_UNIT = {1: 1000.0, 3: 0.001}
"""By the first three bits of xyzt_units: metres and micrometres; all else is mm."""


@dataclass(frozen=True)
class NiftiHeader:
    """What is needed of a NIfTI header to read its voxels."""

    shape: Size3
    channels: int
    affine: FloatArray
    dtype: np.dtype[Any]
    """Type on disk, with its byte order."""
    offset: int
    """Bytes in front of the voxels."""
    slope: float
    intercept: float
    raw: Nifti1Header
    """All of it, for writing a file alike."""
    notes: tuple[str, ...] = ()
    """Where the header contradicts itself, and what was believed."""

    @property
    def is_scaled(self) -> bool:
        """Whether stored numbers are not yet the values."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def is_in_mm(self) -> bool:
        """Whether the header's lengths are millimetres, as the affine's always are."""
        return _mm_per_unit(self.raw) == 1

    @property
    def num_bytes(self) -> int:
        """Bytes of header and voxels together."""
        return self.offset + math.prod(self.shape) * self.channels * self.dtype.itemsize


def parse_nifti_header(path: Path, head: bytes) -> NiftiHeader:
    """Read a NIfTI header.

    Args:
        path: The file, for errors.
        head: Its first bytes, decompressed; at least 540 of them if it has so many.

    Returns:
        The header.

    Raises:
        FormatError: It is cut off, contradictory, or describes voxels that aren't
            numbers.
        GeometryError: The affine is not finite or singular.
    """
    raw = _raw_header(path, head)
    dtype = _voxel_type(path, raw)
    try:
        shape = tuple(int(n) for n in raw.get_data_shape())
    except (HeaderDataError, ValueError) as error:
        raise _bad_header(path, "a valid NIfTI header", str(error)) from error
    size, channels = _split_channels(path, shape)
    slope, intercept = _scaling(path, raw)
    affine = _affine(path, raw)
    return NiftiHeader(
        shape=size,
        channels=channels,
        affine=affine,
        dtype=dtype,
        offset=_data_offset(path, raw),
        slope=slope,
        intercept=intercept,
        raw=raw,
        notes=_contradictions(size, affine, raw),
    )


def _raw_header(path: Path, head: bytes) -> Nifti1Header:
    is_second = _NIFTI2_BYTES in (
        int.from_bytes(head[:4], "little"),
        int.from_bytes(head[:4], "big"),
    )
    size = _NIFTI2_BYTES if is_second else _NIFTI1_BYTES
    if len(head) < size:
        raise TruncatedFileError(
            describe(
                "a NIfTI header is cut off",
                expected=f"{size} bytes",
                found=len(head),
                file=path,
                remedy="Copy or download the file again.",
            )
        )
    # check=False: nibabel's own check prints to stderr; what matters is checked here.
    if is_second:
        raw: Nifti1Header = Nifti2Header(head[:size], check=False)
    else:
        raw = Nifti1Header(head[:size], check=False)
    if not raw["magic"].tobytes().startswith(b"n+"):
        raise _bad_header(path, "header and voxels in one file", "an .hdr/.img pair")
    return raw


def _voxel_type(path: Path, raw: Nifti1Header) -> np.dtype[Any]:
    try:
        dtype = raw.get_data_dtype()
        found = f"{dtype} voxels"
    except (HeaderDataError, KeyError):
        dtype, found = None, f"voxels of the unknown type {int(raw['datatype'])}"
    if dtype is None or dtype.kind not in "iuf":
        raise _bad_header(path, "integers or real numbers", found)
    return dtype


def _bad_header(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        describe(
            "can't use a NIfTI header",
            expected=expected,
            found=found,
            file=path,
            remedy="Convert the file from its source again.",
        )
    )


def _split_channels(path: Path, shape: tuple[int, ...]) -> tuple[Size3, int]:
    """Split (I, J, K, C) or (I, J, K, 1, C) into grid and channels."""
    if not shape or min(shape) < 1:
        raise _bad_header(path, "at least one voxel along every axis", str(shape))
    shape = shape + (1,) * (3 - len(shape))
    extra = [n for n in shape[3:] if n > 1]
    if len(extra) > 1:
        raise _bad_header(path, "at most one axis of channels", f"shape {shape}")
    return cast(Size3, shape[:3]), extra[0] if extra else 1


def _scaling(path: Path, raw: Nifti1Header) -> tuple[float, float]:
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # the standard's "no scaling", and what many tools write for it
    if not math.isfinite(intercept):
        raise _bad_header(path, "a finite scl_inter", str(intercept))
    return slope, intercept


def _data_offset(path: Path, raw: Nifti1Header) -> int:
    offset = float(raw["vox_offset"])
    least = int(raw["sizeof_hdr"]) + 4
    if not math.isfinite(offset) or offset < 0:
        raise _bad_header(path, "a vox_offset of 0 or more", str(offset))
    return max(int(offset), least)


def _affine(path: Path, raw: Nifti1Header) -> FloatArray:
    """Take the sform if it has a code, else the qform, else the voxel sizes."""
    if int(raw["sform_code"]) <= 0:
        return _unsheared(path, raw)
    with np.errstate(all="ignore"):  # checked afterwards
        return checked_affine(_in_mm(raw.get_sform(), raw), path)


def _mm_per_unit(raw: Nifti1Header) -> float:
    return _MM_PER_UNIT.get(int(raw["xyzt_units"]) & 7, 1.0)


def _in_mm(affine: Any, raw: Nifti1Header) -> FloatArray:
    return np.concatenate([affine[:3] * _mm_per_unit(raw), affine[3:]])


def _unsheared(path: Path, raw: Nifti1Header) -> FloatArray:
    """Compose the qform if it has a code, else what the voxel sizes alone say."""
    fixed = raw.copy()
    fixed["sform_code"] = 0
    if fixed["pixdim"][0] not in (-1, 1):
        fixed["pixdim"][0] = 1  # the standard: "if 0, use 1"
    with np.errstate(all="ignore"):
        checked_sizes(raw["pixdim"][1:4], path)
        try:
            affine = fixed.get_best_affine()
        except (HeaderDataError, ValueError) as error:
            raise _bad_header(path, "a valid qform", str(error)) from error
        return checked_affine(_in_mm(affine, raw), path)


def _contradictions(
    shape: Size3, affine: FloatArray, raw: Nifti1Header
) -> tuple[str, ...]:
    """Compare what places the voxels with what else the header says of them."""
    if int(raw["sform_code"]) <= 0:
        return ()
    notes = []
    true = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(all="ignore"):
        stated = np.asarray(raw["pixdim"][1:4], np.float64) * _mm_per_unit(raw)
    if not np.allclose(stated, true, rtol=1e-2, atol=1e-4):
        found = f"{_mm(stated)} in pixdim, {_mm(true)} in the sform"
        notes.append(f"voxel sizes contradict each other: {found}, which counts")
    if int(raw["qform_code"]) > 0:
        try:
            qform = _unsheared(Path(), raw)
        except SegMambaError:
            return (*notes, "the qform is unusable; the sform counts")
        difference = describe_grid_difference(shape, affine, shape, qform)
        if difference is not None:
            notes.append(f"sform and qform differ: {difference}; the sform counts")
    return tuple(notes)


def _mm(sizes: Any) -> str:
    return " x ".join(f"{float(size):.4g}" for size in sizes) + " mm"


def read_nifti(path: Path, header: NiftiHeader) -> Array:
    """Read the voxels of a NIfTI file as they are stored.

    Args:
        path: The file.
        header: Its header.

    Returns:
        (C, I, J, K), with the file's number type and byte order, not scaled, not
        writable; the first spatial axis lies densest in memory, as in the file.

    Raises:
        FormatError: The file ends early or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error
    compressed = data[:2] == GZIP_MAGIC
    check_room(path, len(data), header.num_bytes, compressed)
    if compressed:
        data = inflate(path, data, header.num_bytes)
    count = math.prod(header.shape) * header.channels
    flat = np.frombuffer(data, header.dtype, count, header.offset)
    return flat.reshape((header.channels, *header.shape[::-1])).transpose(0, 3, 2, 1)


def check_size(path: Path, header: NiftiHeader) -> None:
    """Refuse a file that can't hold what its header claims.

    Args:
        path: The file.
        header: Its header.

    Raises:
        FormatError: It is too small, has vanished, or claims more than memory holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            compressed = file.read(2) == GZIP_MAGIC
    except OSError as error:
        raise _cannot_read(path, error) from error
    check_room(path, size, header.num_bytes, compressed)


def _cannot_read(path: Path, error: OSError) -> FormatError:
    return FormatError(
        describe("can't read a scan", found=error.strerror or error, file=path)
    )
