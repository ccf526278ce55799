"""Read scans of any known format, and put the channels of a case together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from segmamba.errors import FormatError, GeometryError, describe
from segmamba.io.formats import detect_format, read_head
from segmamba.io.geometry import describe_grid_difference
from segmamba.io.metaimage import read_metaimage_header
from segmamba.io.nifti import NiftiHeader, check_size, parse_nifti_header, read_nifti
from segmamba.io.nrrd import read_nrrd_header
from segmamba.io.texthead import TextHeader, read_text_voxels
from segmamba.io.volume import Volume
from segmamba.types import Array, FloatArray, Size3, Spacing3

_FILES_AT_ONCE = 4
"""Files of a case that are unpacked at the same time; each is in memory as stored."""


@dataclass(frozen=True)
class VolumeHeader:
    """What a scan's header says; no voxel has been read."""

    shape: Size3
    """Voxels along I, J, K."""
    channels: int
    """Channels in the file."""
    affine: FloatArray
    """(4, 4), float64: voxel index to RAS+ in mm."""
    dtype: np.dtype[Any]
    """Number type that `read_volume` gives."""
    path: Path
    """The file."""
    notes: tuple[str, ...] = ()
    """Where the header contradicts itself, and what was believed."""

    @property
    def spacing_mm(self) -> Spacing3:
        """Distance between neighbouring voxels along I, J, K in mm."""
        norms = np.linalg.norm(self.affine[:3, :3], axis=0)
        return cast(Spacing3, tuple(float(n) for n in norms))


def read_header(path: Path | str) -> VolumeHeader:
    """Read a scan's header, and only that.

    Args:
        path: A NIfTI, NRRD, MHA or MHD file; the content decides, not the name.

    Returns:
        The header.

    Raises:
        FormatError: The file is missing, no scan, or too small for what it claims.
        GeometryError: The affine is not finite or singular.
    """
    path = Path(path)
    header = _open(path)
    dtype, notes = header.dtype, ()
    if isinstance(header, NiftiHeader):
        check_size(path, header)
        dtype = np.dtype(np.float64) if header.is_scaled else dtype
        notes = header.notes
    return VolumeHeader(
        shape=header.shape,
        channels=header.channels,
        affine=header.affine,
        dtype=dtype.newbyteorder("="),
        path=path,
        notes=notes,
    )


def scan_files(path: Path | str) -> tuple[Path, ...]:
    """Name the files that a scan consists of.

    Args:
        path: A NIfTI, NRRD, MHA or MHD file; the header is read of the latter two.

    Returns:
        The file, and the one with its voxels if they lie beside it (MHD).

    Raises:
        FormatError: A header is broken, or the voxels are missing.
        GeometryError: Its affine is unusable.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mha", ".mhd"):
        return (path,)
    header = _open(path)
    voxels = header.voxels if isinstance(header, TextHeader) else path
    return (path,) if voxels == path else (path, voxels)


def read_volume(
    path: Path | str,
    *,
    dtype: npt.DTypeLike | None = None,
    frame: int | None = None,
) -> Volume:
    """Read a scan of any known format.

    Args:
        path: A NIfTI, NRRD, MHA or MHD file; the content decides, not the name.
        dtype: Number type wanted; None keeps the file's (float64 if the header scales).
            An integer type is only given where it holds every voxel exactly.
        frame: Which of the fourth axis to read, from 0, as a volume of one channel;
            None makes all of them channels.

    Returns:
        The volume: (C, I, J, K) and its affine (RAS+, mm). The first spatial axis lies
        densest in memory, as in the file.

    Raises:
        FormatError: The file is missing, no scan, truncated, lacks the frame, or its
            voxels don't fit `dtype`.
        GeometryError: The affine is not finite or singular.
    """
    path = Path(path)
    wanted = None if dtype is None else np.dtype(dtype)
    header = _open(path)
    if frame is not None:
        _check_frame(frame, header.channels, path)
    is_nifti = isinstance(header, NiftiHeader)
    stored = read_nifti(path, header) if is_nifti else read_text_voxels(header)
    if frame is not None:
        stored = stored[frame : frame + 1]
    if is_nifti and header.is_scaled:
        array = _scale(stored, header, wanted, path)
    else:
        array = _convert(stored, wanted, path)
    return Volume(array=array, affine=header.affine, path=path)


def _check_frame(frame: int, count: int, path: Path) -> None:
    if not 0 <= frame < count:
        raise FormatError(
            describe(
                "a scan has no such frame",
                expected=f"0 to {count - 1}",
                found=frame,
                file=path,
            )
        )


def read_case(
    images: Sequence[Path | str],
    *,
    dtype: npt.DTypeLike = np.float32,
    frame: int | None = None,
) -> Volume:
    """Read all channels of a case into one volume.

    Args:
        images: One file per channel, or fewer files that hold several (4D).
        dtype: Number type of the result.
        frame: Which of the fourth axis to read, from 0: then each file is a channel.
            None makes the fourth axis channels.

    Returns:
        The volume, with the first file's affine: (C, I, J, K), channels in the order of
        the files.

    Raises:
        FormatError: A file is missing or no scan, or `images` is empty.
        GeometryError: The files lie on different grids; the text says by how much.
    """
    if not images:
        raise FormatError(
            describe("a case has no images", expected="one file or more", found=0)
        )
    headers = [read_header(path) for path in images]
    check_same_grid(headers)
    if len(headers) == 1:
        return read_volume(headers[0].path, dtype=dtype, frame=frame)
    counts = [1 if frame is not None else header.channels for header in headers]
    channels = sum(counts)
    # The first spatial axis lies densest, as in the files: no transposed copying.
    shape = (channels, *headers[0].shape[::-1])
    array = np.empty(shape, dtype).transpose(0, 3, 2, 1)
    stops = itertools.accumulate(counts)

    def fill(path: Path, stop: int, count: int) -> None:
        part = read_volume(path, dtype=dtype, frame=frame)
        array[stop - count : stop] = part.array

    # Threads: reading, unpacking and converting let go of Python's lock.
    with ThreadPoolExecutor(min(len(headers), _FILES_AT_ONCE)) as pool:
        paths = [header.path for header in headers]
        list(pool.map(fill, paths, stops, counts))  # raises what the first one raised
    return Volume(array=array, affine=headers[0].affine, path=headers[0].path)


def check_same_grid(headers: Sequence[VolumeHeader]) -> None:
    """Refuse scans that don't lie on the grid of the first one.

    Args:
        headers: Their headers, at least one.

    Raises:
        GeometryError: Shape or affine differ; the text says by how much.
    """
    first = headers[0]
    for other in headers[1:]:
        difference = describe_grid_difference(
            first.shape, first.affine, other.shape, other.affine
        )
        if difference is not None:
            raise GeometryError(
                describe(
                    "two files of a case lie on different grids",
                    expected=f"the grid of {first.path.name}",
                    found=difference,
                    file=other.path,
                    remedy="Resample one onto the other first.",
                )
            )


def _open(path: Path) -> NiftiHeader | TextHeader:
    head = read_head(path)
    kind = detect_format(path, head)
    if kind == "nifti":
        return parse_nifti_header(path, head)
    return read_nrrd_header(path) if kind == "nrrd" else read_metaimage_header(path)


def _scale(
    stored: Array, header: NiftiHeader, dtype: np.dtype[Any] | None, path: Path
) -> Array:
    """Apply slope and intercept in float64, one slice at a time to save memory."""
    target = np.dtype(np.float64) if dtype is None else dtype
    floating = target if target.kind == "f" else np.dtype(np.float64)
    values = np.empty_like(stored, dtype=floating)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(stored.shape[3]):
            part = stored[..., k].astype(np.float64)
            values[..., k] = part * header.slope + header.intercept
    return _convert(values, target, path)


def _convert(stored: Array, dtype: np.dtype[Any] | None, path: Path) -> Array:
    """Give a writable array in native byte order and the wanted type."""
    native = stored.dtype.newbyteorder("=")
    target = native if dtype is None else dtype
    if target.kind in "iu" and target != native:
        _check_fits(stored, target, path)
    if stored.dtype == target and stored.flags.writeable:
        return stored
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(target, order="K")


def _check_fits(stored: Array, target: np.dtype[Any], path: Path) -> None:
    limits = np.iinfo(target)
    found = None
    if not np.isfinite(stored).all():
        found = "NaN or infinite voxels"
    # As Python's integers: float32 rounds the limit of int32 up, to 2^31.
    elif int(stored.min()) < limits.min or int(stored.max()) > limits.max:
        found = f"values from {stored.min()} to {stored.max()}"
    elif stored.dtype.kind == "f" and (stored != np.rint(stored)).any():
        found = f"{np.count_nonzero(stored != np.rint(stored))} fractional voxels"
    if found is not None:
        raise FormatError(
            describe(
                "voxels don't fit the number type wanted",
                expected=f"integers from {limits.min} to {limits.max}",
                found=found,
                file=path,
                remedy="Check that this file is a label map.",
            )
        )
