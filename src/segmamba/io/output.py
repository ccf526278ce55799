"""Write label maps and volumes, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from segmamba.atomic import atomic_path
from segmamba.errors import FormatError, GeometryError, describe
from segmamba.io.formats import FakeFileError, detect_format, read_head, scan_suffix
from segmamba.io.geometry import checked_affine
from segmamba.io.metaimage import write_metaimage, write_metaimage_pair
from segmamba.io.nifti import NiftiHeader, parse_nifti_header
from segmamba.io.nrrd import write_nrrd
from segmamba.io.volume import Volume
from segmamba.types import Array, FloatArray

_LARGEST_NIFTI1_SIDE = 32767
_GZIP_WBITS = 31
_SCANNER_CODE = 1
_QFORM_TOLERANCE = 2e-3
"""Near half a turn, a quaternion of three float32 numbers is no better than this."""
_KEPT_FIELDS = ("dim_info", "xyzt_units")
_GRID_FIELDS = (
    *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


def write_label_map(
    path: Path | str,
    label_map: Array,
    affine: FloatArray,
    *,
    like: Path | str | None = None,
) -> None:
    """Write a label map in the geometry of its scan, atomically.

    Args:
        path: The file; its ending chooses the format.
        label_map: (I, J, K), integers (or floats that are).
        affine: (4, 4), voxel index to RAS+ in mm.
        like: The scan that was segmented; if it and `path` are NIfTI, its units, its
            sform and qform codes and, on the same grid, its very header numbers are
            taken over. On another grid, metres and micrometres become mm.

    Raises:
        ConfigError: The name's ending is none of a scan.
        FormatError: Values aren't integers of 32 bits, or the file can't be written.
        GeometryError: The label map has not three axes, or the affine is unusable.
    """
    label_map = np.asarray(label_map)
    if label_map.ndim != 3:
        raise GeometryError(
            describe(
                "bad label map",
                expected="three axes (I, J, K)",
                found=f"shape {label_map.shape}",
                file=path,
            )
        )
    array = label_map.astype(_label_type(label_map, Path(path)), copy=False)
    _write(Path(path), array[None], affine, None if like is None else Path(like))


def write_volume(
    path: Path | str, volume: Volume, *, like: Path | str | None = None
) -> None:
    """Write a volume, atomically.

    Args:
        path: The file; its ending chooses the format.
        volume: What to write; several channels become a fourth axis (NIfTI) or vectors
            (NRRD, MHA).
        like: A NIfTI file whose units and codes are taken over.

    Raises:
        ConfigError: The name's ending is none of a scan.
        FormatError: The number type can't be stored, or the file can't be written.
        GeometryError: The affine is unusable.
    """
    array = _storable(volume.array, Path(path))
    _write(Path(path), array, volume.affine, None if like is None else Path(like))


def _label_type(label_map: Array, path: Path) -> np.dtype[Any]:
    """Choose the smallest of uint8, int16 and int32 that holds every label."""
    low, high = (label_map.min(), label_map.max()) if label_map.size else (0, 0)
    if label_map.dtype.kind == "f" and not (
        np.isfinite([low, high]).all() and (label_map == np.rint(label_map)).all()
    ):
        raise FormatError(
            describe(
                "a label map holds fractions or NaN", expected="integers", file=path
            )
        )
    # As Python's integers: float32 rounds the limit of int32 up, to 2^31.
    for name in ("uint8", "int16", "int32"):
        if np.iinfo(name).min <= int(low) and int(high) <= np.iinfo(name).max:
            return np.dtype(name)
    raise FormatError(
        describe(
            "labels are too large",
            expected="integers of 32 bits",
            found=f"values from {low} to {high}",
            file=path,
        )
    )


def _storable(array: Array, path: Path) -> Array:
    """Turn number types that formats lack into the nearest one without loss."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise FormatError(
            describe(
                "can't store this number type",
                expected="integers or real numbers of at most 64 bits",
                found=array.dtype,
                file=path,
            )
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _write(path: Path, array: Array, affine: FloatArray, like: Path | None) -> None:
    suffix = scan_suffix(path)
    affine = checked_affine(affine, path)
    try:
        with atomic_path(path) as temporary:
            if suffix == ".nrrd":
                write_nrrd(temporary, array, affine)
            elif suffix == ".mha":
                write_metaimage(temporary, array, affine)
            elif suffix == ".mhd":
                write_metaimage_pair(path, temporary, array, affine)
            else:
                data = _nifti_bytes(array, affine, _like_header(like))
                if suffix == ".nii.gz":
                    data = isal_zlib.compress(data, wbits=_GZIP_WBITS)
                temporary.write_bytes(data)
    except OSError as error:
        raise FormatError(
            describe(
                "can't write a scan",
                found=error.strerror or type(error).__name__,
                file=path,
                remedy="Check the folder's rights and the space on the disk.",
            )
        ) from error


def _like_header(like: Path | None) -> NiftiHeader | None:
    if like is None:
        return None
    head = read_head(like)
    try:
        if detect_format(like, head) != "nifti":
            return None
    except FakeFileError:  # DICOM, or an archive of it
        return None
    return parse_nifti_header(like, head)


def _nifti_bytes(array: Array, affine: FloatArray, like: NiftiHeader | None) -> bytes:
    shape = array.shape[1:] if array.shape[0] == 1 else (*array.shape[1:], len(array))
    second = max(shape) > _LARGEST_NIFTI1_SIDE
    header: Nifti1Header = Nifti2Header() if second else Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    if like is not None:
        for name in _KEPT_FIELDS:
            header[name] = like.raw[name]
    _place(header, affine, like)
    header["scl_slope"], header["scl_inter"] = 0, 0
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    header["magic"] = b"n+2" if second else b"n+1"
    voxels = array.transpose(0, 3, 2, 1).tobytes()
    return header.binaryblock + b"\0\0\0\0" + voxels


def _place(header: Any, affine: FloatArray, like: NiftiHeader | None) -> None:
    """Write the affine: the input's own numbers if it is unchanged, else afresh."""
    unchanged = like is not None and np.array_equal(affine, like.affine)
    if like is not None and unchanged and header.get_data_shape()[:3] == like.shape:
        for name in _GRID_FIELDS:
            header[name] = like.raw[name]
        header["pixdim"][:4] = like.raw["pixdim"][:4]
        return
    if like is not None and not like.is_in_mm:
        header.set_xyzt_units("mm")
    sform, qform = _SCANNER_CODE, _SCANNER_CODE
    if like is not None:
        sform = int(like.raw["sform_code"]) or int(like.raw["qform_code"]) or sform
        qform = int(like.raw["qform_code"])
    header.set_sform(affine, code=sform)
    header.set_qform(affine, code=qform, strip_shears=True)
    scale = np.abs(affine[:3, :3]).max()
    if np.abs(header.get_qform() - affine)[:3, :3].max() > _QFORM_TOLERANCE * scale:
        header["qform_code"] = 0  # a quaternion can't say this affine: don't pretend
