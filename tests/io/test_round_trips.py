"""Whatever goes through a file comes back: voxels, affine, orientation.

Every format, number type, byte order and kind of affine, against nibabel and ITK.
"""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from segmamba.data.geometry import axis_codes
from segmamba.errors import FormatError, GeometryError
from segmamba.io import (
    SCAN_SUFFIXES,
    Volume,
    read_case,
    read_header,
    read_volume,
    write_label_map,
    write_volume,
)

CODES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def turned() -> np.ndarray:
    cos, sin = np.cos(0.3), np.sin(0.3)
    about_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return about_z @ about_x


def affines() -> dict[str, np.ndarray]:
    """All 48 axis orders, straight and oblique, and a sheared grid."""
    found = {}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            straight = np.eye(4)
            straight[:3, :3] = np.eye(3)[list(order)].T * np.array(signs)
            oblique = straight.copy()
            oblique[:3, :3] = turned() @ straight[:3, :3]
            for kind, affine in (("straight", straight), ("oblique", oblique)):
                affine[:3, :3] *= [0.5, 1.25, 3.0]
                affine[:3, 3] = [-7.5, 11.25, 13.0]
                found[f"{kind} {axis_codes(affine)}"] = affine
    sheared = np.diag([1.0, 1.0, 2.0, 1.0])
    sheared[0, 2] = 0.4
    return {**found, "sheared": sheared}


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_every_orientation_comes_back(tmp_path: Path, suffix: str) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    assert len(affines()) == 97
    for name, affine in affines().items():
        path = tmp_path / f"x{suffix}"
        write_volume(path, Volume(voxels, affine))
        volume, header = read_volume(path), read_header(path)
        assert np.allclose(volume.affine, affine, atol=1e-5), name
        assert np.array_equal(header.affine, volume.affine), name
        assert axis_codes(volume.affine) == axis_codes(affine), name
        assert np.array_equal(volume.array, voxels), name
        assert header.notes == (), name


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_other_programs_see_the_same_place(tmp_path: Path, suffix: str) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    path = tmp_path / f"x{suffix}"
    for name, affine in affines().items():
        if name == "sheared":  # ITK takes no shear
            continue
        write_volume(path, Volume(voxels, affine))
        image = sitk.ReadImage(str(path))
        point = np.array(image.TransformIndexToPhysicalPoint((1, 2, 3))) * [-1, -1, 1]
        assert np.allclose(point, (affine @ (1, 2, 3, 1))[:3], atol=1e-4), name
        assert image.GetPixel((1, 2, 3)) == voxels[0, 1, 2, 3]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_every_type_comes_back(tmp_path, suffix: str, code: str, channels: int) -> None:
    limits: Any = np.finfo(code) if code[0] == "f" else np.iinfo(code)
    voxels = np.arange(24 * channels).astype(code).reshape(channels, 2, 3, 4)
    voxels[0, 0, 0, 0], voxels[0, 1, 2, 3] = limits.min, limits.max
    write_volume(tmp_path / f"x{suffix}", Volume(voxels, np.eye(4)))
    volume = read_volume(tmp_path / f"x{suffix}")
    assert volume.array.dtype == np.dtype(code)
    assert np.array_equal(volume.array, voxels)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("order", ["little", "big"])
def test_both_byte_orders_of_text_formats(tmp_path, suffix, code, order) -> None:
    """NIfTI's are tested in test_nifti.py."""
    voxels = np.arange(24).astype(code).reshape(2, 3, 4) * 3
    stored = voxels.astype(code).transpose(2, 1, 0)
    stored = stored.astype((">" if order == "big" else "<") + code).tobytes()
    path = tmp_path / f"x{suffix}"
    head = read_back(write_volume, path, voxels[None])
    if suffix == ".nrrd":
        head = head.replace(b"endian: little", b"endian: " + order.encode())
        path.write_bytes(head.replace(b"encoding: gzip", b"encoding: raw") + stored)
    else:
        flag = b"True" if order == "big" else b"False"
        head = head.replace(b"ByteOrderMSB = False", b"ByteOrderMSB = " + flag)
        head = head.replace(b"CompressedData = True", b"CompressedData = False")
        path.write_bytes(head + (stored if suffix == ".mha" else b""))
        if suffix == ".mhd":
            path.with_suffix(".zraw").write_bytes(stored)
    volume = read_volume(path)
    assert volume.array.dtype == np.dtype(code)
    assert volume.array.dtype.isnative
    assert np.array_equal(volume.array[0], voxels)


def read_back(write, path: Path, voxels: np.ndarray) -> bytes:
    """Write a scan and give its text header."""
    write(path, Volume(voxels, np.eye(4)))
    data = path.read_bytes()
    end = b"\n\n" if path.suffix == ".nrrd" else b"LOCAL\n"
    return data if path.suffix == ".mhd" else data[: data.index(end) + len(end)]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("code", ["u1", "i2", "f4"])
def test_mhd_of_itk(tmp_path: Path, code: str, compressed: bool) -> None:
    voxels = np.arange(60).astype(code).reshape(5, 4, 3)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 1.5, 3.0))
    image.SetOrigin((-12.0, 34.0, 56.0))
    sitk.WriteImage(image, str(tmp_path / "ü.mhd"), compressed)
    assert len(list(tmp_path.iterdir())) == 2
    volume = read_volume(tmp_path / "ü.mhd")
    assert np.array_equal(volume.array[0], voxels.T)
    assert volume.spacing_mm == (0.5, 1.5, 3.0)
    assert np.array_equal(volume.affine[:3, 3], [12.0, -34.0, 56.0])


def test_itk_reads_our_mhd(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (3, 4, 5))
    write_label_map(tmp_path / "x.mhd", labels, np.diag([2.0, 3.0, 4.0, 1.0]))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.mhd", "x.zraw"]
    image = sitk.ReadImage(str(tmp_path / "x.mhd"))
    assert np.array_equal(sitk.GetArrayFromImage(image).T, labels)
    assert image.GetSpacing() == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("header_size", ["-1", "5"])
def test_voxels_behind_a_foreign_header(tmp_path: Path, header_size: str) -> None:
    head = (
        "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\n"
        f"HeaderSize = {header_size}\nElementDataFile = x.raw\n"
    )
    (tmp_path / "x.mhd").write_bytes(head.encode())
    (tmp_path / "x.raw").write_bytes(b"other" + bytes(range(24)))
    voxels = read_volume(tmp_path / "x.mhd").array
    assert voxels.ravel(order="F").tolist() == list(range(24))


def test_voxels_that_are_too_few_or_gone_are_named(tmp_path: Path) -> None:
    write_volume(tmp_path / "x.mhd", Volume(np.zeros((1, 9, 9, 9)), np.eye(4)))
    (tmp_path / "x.zraw").write_bytes(b"")
    with pytest.raises(FormatError, match="truncated"):
        read_header(tmp_path / "x.mhd")
    (tmp_path / "x.zraw").unlink()
    with pytest.raises(FormatError, match=r"x\.zraw beside it.*no such file"):
        read_header(tmp_path / "x.mhd")


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_one_frame_of_four_axes(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    path = tmp_path / f"x{suffix}"
    write_volume(path, Volume(array, np.eye(4)))
    for frame in range(3):
        volume = read_volume(path, frame=frame)
        assert np.array_equal(volume.array, array[frame : frame + 1])
        assert np.array_equal(read_case([path], frame=frame).array, volume.array)
        both = read_case([path, path], frame=frame)
        assert np.array_equal(both.array, array[[frame, frame]])
    for frame in (3, -1):
        with pytest.raises(FormatError, match="no such frame: expected 0 to 2"):
            read_volume(path, frame=frame)


def nifti(path: Path, *, sform=None, qform=None, pixdim=None) -> Path:
    """Write a NIfTI with just these fields set."""
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None)
    if sform is not None:
        image.set_sform(np.diag([*sform, 1.0]), code=1)
    if qform is not None:
        image.set_qform(np.diag([*qform, 1.0]), code=1)
    image.header["sform_code"] = int(sform is not None)
    image.header["qform_code"] = int(qform is not None)
    nib.save(image, path)
    data = bytearray(path.read_bytes())
    if pixdim is not None:
        data[80:92] = np.array(pixdim, "<f4").tobytes()
    data[252:256] = np.array([qform is not None, sform is not None], "<i2").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("pixdim", [(0, 1, 1), (1, -1, 1), (1, 1, float("nan"))])
@pytest.mark.parametrize("qform", [None, (1, 1, 1)])
def test_sizes_of_zero_or_below_are_refused(tmp_path, pixdim, qform) -> None:
    path = nifti(tmp_path / "x.nii", qform=qform, pixdim=pixdim)
    for read in (read_header, read_volume):
        with pytest.raises(GeometryError, match="sizes in mm above 0, found"):
            read(path)


def test_a_sound_sform_outweighs_the_sizes_and_says_so(tmp_path: Path) -> None:
    path = nifti(tmp_path / "x.nii", sform=(2, 3, 4), pixdim=(2, -3, 0))
    assert read_header(path).spacing_mm == (2, 3, 4)
    (note,) = read_header(path).notes
    assert "2 x -3 x 0 mm in pixdim, 2 x 3 x 4 mm in the sform, which counts" in note
    assert read_header(nifti(path, sform=(2, 3, 4), pixdim=(2, 3, 4))).notes == ()


def test_a_qform_elsewhere_is_noted(tmp_path: Path) -> None:
    path = nifti(tmp_path / "x.nii", sform=(2, 3, 4), qform=(2, -3, 4))
    assert np.array_equal(read_volume(path).affine, np.diag([2.0, 3, 4, 1]))
    (note,) = read_header(path).notes
    assert note.startswith("sform and qform differ: a corner")
    assert note.endswith("the sform counts")
    assert read_header(nifti(path, sform=(2, 3, 4), qform=(2, 3, 4))).notes == ()


@pytest.mark.parametrize("sizes", [(1e-9, 1, 1), (1, 1, 1e9)])
def test_impossible_sizes_are_refused(tmp_path: Path, sizes) -> None:
    with pytest.raises(GeometryError, match="impossible size"):
        read_header(nifti(tmp_path / "x.nii", sform=sizes))


@pytest.mark.parametrize("sizes", ["1 -2 3", "0 2 3"])
def test_spacings_of_text_formats_are_above_zero(tmp_path: Path, sizes: str) -> None:
    nrrd = "NRRD0001\ntype: uchar\ndimension: 3\nsizes: 1 1 1\nencoding: raw\n"
    (tmp_path / "x.nrrd").write_bytes(f"{nrrd}spacings: {sizes}\n\n\0".encode())
    mha = f"NDims = 3\nDimSize = 1 1 1\nElementSpacing = {sizes}\n"
    mha += "ElementType = MET_UCHAR\nElementDataFile = LOCAL\n\0"
    (tmp_path / "x.mha").write_bytes(mha.encode())
    for name in ("x.nrrd", "x.mha"):
        with pytest.raises(GeometryError, match="sizes in mm above 0, found"):
            read_header(tmp_path / name)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", ["u1", "i2", "f4"])
def test_scaled_voxels_come_back_as_their_values(tmp_path, suffix, order, code) -> None:
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(order + code)
    path = tmp_path / f"a{suffix}"
    nib.save(nib.Nifti1Image(np.arange(60).reshape(3, 4, 5), np.eye(4), header), path)
    with (gzip.open if suffix.endswith("gz") else open)(path, "rb") as file:
        data = bytearray(file.read())
    data[112:120] = np.array([0.5, -7.0], f"{order}f4").tobytes()
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    volume = read_volume(path)
    assert np.array_equal(volume.array[0], nib.load(path).get_fdata())
    assert volume.array[0, 0, 0, 1] == 0.5 - 7.0
    for name in SCAN_SUFFIXES:
        write_volume(tmp_path / f"b{name}", volume)
        assert np.array_equal(read_volume(tmp_path / f"b{name}").array, volume.array)
