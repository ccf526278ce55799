"""Readers of scans and of DICOM in folders and archives."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dicom_series
import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Image
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless
from target import Target, plain

from segmamba.io import (
    Volume,
    list_series,
    read_header,
    read_series,
    read_volume,
    write_volume,
)


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def _scan(path: Path) -> None:
    read_header(path)
    volume = read_volume(path)
    assert volume.array.ndim == 4
    assert np.isfinite(volume.affine).all()
    try:
        read_volume(path, dtype=np.int16)
    finally:
        read_volume(path, dtype=np.float32)


def _voxels(*shape: int, dtype: str = "<i2") -> Any:
    return np.random.default_rng(0).integers(0, 99, shape).astype(dtype)


def _nifti_files(scratch: Path) -> list[bytes]:
    affine = np.array([[-1, 0, 0.1, 9], [0, 0, 2, 8], [0, 1.5, 0, 7], [0, 0, 0, 1.0]])
    files = []
    for index, (cls, order, shape, dtype) in enumerate(
        (
            (Nifti1Image, "<", (5, 4, 3), "i2"),
            (Nifti1Image, ">", (5, 4, 3), "f4"),
            (Nifti2Image, "<", (5, 4, 3), "u1"),
            (Nifti1Image, "<", (4, 3, 2, 3), "f8"),
        )
    ):
        header = cls.header_class(endianness=order)
        header.set_data_dtype(order + dtype)
        header.set_slope_inter(2.0 if index == 3 else 1.0, -10.0 if index == 3 else 0)
        path = scratch / f"{index}.nii"
        nib.save(cls(_voxels(*shape, dtype=order + dtype), affine, header), path)
        files.append(path.read_bytes())
    return files


def scans(scratch: Path) -> list[Target]:
    nifti = _nifti_files(scratch)
    write_volume(scratch / "x.nrrd", Volume(_voxels(1, 4, 3, 2), np.eye(4)))
    write_volume(scratch / "y.nrrd", Volume(_voxels(2, 4, 3, 2), np.eye(4)))
    write_volume(scratch / "x.mha", Volume(_voxels(1, 4, 3, 2), np.eye(4)))
    write_volume(scratch / "y.mha", Volume(_voxels(2, 4, 3, 2), np.eye(4)))
    nrrd = [(scratch / f"{name}.nrrd").read_bytes() for name in "xy"]
    raw = nrrd[0].split(b"\n\n")[0].replace(b"gzip", b"raw") + b"\n\n"
    nrrd += [raw + _voxels(4, 3, 2).tobytes()]
    mha = [(scratch / f"{name}.mha").read_bytes() for name in "xy"]
    head = mha[0][: mha[0].index(b"LOCAL") + 6].replace(
        b"CompressedData = True", b"CompressedData = False"
    )
    mha += [head + _voxels(4, 3, 2).tobytes()]
    write_volume(scratch / "x.mhd", Volume(_voxels(1, 4, 3, 2), np.eye(4)))
    mhd, zraw = ((scratch / f"x.{end}").read_bytes() for end in ("mhd", "zraw"))
    return [
        Target("nifti", "x.nii", _scan, plain(nifti)),
        Target("nifti-gzip", "x.nii.gz", _scan, plain(nifti, _gzip)),
        Target("nrrd", "x.nrrd", _scan, plain(nrrd)),
        Target("mha", "x.mha", _scan, plain(mha)),
        Target("mhd", "x.mhd", _scan, plain([mhd]), {"x.zraw": zraw}),
    ]


def _bytes(data: Dataset) -> bytes:
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _study(source: Path) -> None:
    for series in list_series(source):
        read_series([series])


def dicom() -> list[Target]:
    small = _voxels(3, 4, 6, dtype="<u2")
    frames = _bytes(dicom_series.multi_frame(small, [0, 2, 1]))
    first, *rest = dicom_series.datasets(small, RescaleSlope=2, RescaleIntercept=-5)
    beside = {f"{index}.dcm": _bytes(data) for index, data in enumerate(rest)}
    rle, jpeg = dicom_series.datasets(small)[:2]
    rle.compress(RLELossless)
    jpeg.compress(JPEGLSLossless)
    slices = [_bytes(data) for data in (first, rle, jpeg)]
    found = [
        Target("dicom-file", "x.dcm", _study, plain([frames])),
        Target(
            "dicom-folder",
            "study/x.dcm",
            lambda path: _study(path.parent),
            plain(slices),
            {f"study/{name}": data for name, data in beside.items()},
        ),
    ]
    for suffix, pack in ARCHIVES.items():

        def packed(data: bytes, pack: Any = pack) -> bytes:
            return pack({"a/x.dcm": data, **beside})

        name = suffix.replace(".", "-")
        found.append(
            Target(f"archive-{name}", f"x.{suffix}", _study, plain(slices[:2], packed))
        )
    return found


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": _zip,
    "tar": _tar,
    "tar.gz": lambda files: _gzip(_tar(files)),
    "tar.xz": lambda files: lzma.compress(_tar(files), preset=0),
}
