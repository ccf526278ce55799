"""Label maps keep their scan's geometry, in every format, whole or not at all."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segmamba.errors import ConfigError, FormatError, GeometryError, SegMambaError
from segmamba.io import (
    SCAN_SUFFIXES,
    Volume,
    read_header,
    read_volume,
    write_label_map,
    write_volume,
)


def block(shape=(3, 4, 5), high=4, dtype=np.int64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def oblique(angle: float = 0.4) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt * [0.7, 0.7, 5.0]
    affine[:3, 3] = [-80.5, 12.25, 33.0]
    return affine


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_all_48_axis_orders(tmp_path: Path, suffix: str) -> None:
    path, labels = tmp_path / f"x{suffix}", block()
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[list(order)] * np.array(signs) * [0.5, 1.5, 3]
            affine[:3, 3] = [-7, 11, 13]
            write_label_map(path, labels, affine)
            volume = read_volume(path)
            assert np.allclose(volume.affine, affine, atol=1e-6)
            assert np.array_equal(volume.array[0], labels)


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_oblique_and_sheared_affines(tmp_path: Path, suffix: str) -> None:
    sheared = oblique()
    sheared[:3, 2] += [0.8, 0.1, 0]
    for affine in (oblique(), sheared):
        path = tmp_path / f"x{suffix}"
        write_label_map(path, block(), affine)
        assert np.allclose(read_volume(path).affine, affine, atol=1e-5)


@settings(max_examples=40, deadline=None)
@example(angle=3.09375, sizes=(1.0, 1.0, 3.0), flip=-1)  # a quaternion's worst place
@given(
    angle=st.floats(-3.1, 3.1),
    sizes=st.tuples(*[st.floats(0.2, 6)] * 3),
    flip=st.sampled_from([-1, 1]),
)
def test_sform_and_qform_agree(tmp_path_factory, angle, sizes, flip) -> None:
    affine = oblique(angle)
    affine[:3, :3] *= np.array(sizes) * [1, 1, flip]
    path = tmp_path_factory.getbasetemp() / "forms.nii"
    write_label_map(path, block(), affine)
    image = nib.load(path)
    assert np.allclose(image.get_sform(), affine, rtol=1e-5, atol=1e-4)
    qform, code = image.get_qform(coded=True)
    assert code == 1
    assert np.abs(qform - affine).max() < 2e-3 * np.abs(affine[:3, :3]).max()


def test_shear_leaves_no_false_qform(tmp_path: Path) -> None:
    affine = oblique()
    affine[:3, 2] += [0.8, 0.1, 0]
    write_label_map(tmp_path / "x.nii", block(), affine)
    header = nib.load(tmp_path / "x.nii").header
    assert (header["sform_code"], header["qform_code"]) == (1, 0)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((0, 255), np.uint8),
        ((0, 256), np.int16),
        ((-1, 5), np.int16),
        ((0, 40000), np.int32),
        ((0.0, 4.0), np.uint8),
        ((False, True), np.uint8),
    ],
)
def test_smallest_type_that_holds_the_labels(tmp_path: Path, values, dtype) -> None:
    labels = np.array([*values, *values]).reshape(2, 2, 1)
    write_label_map(tmp_path / "x.nii.gz", labels, np.eye(4))
    volume = read_volume(tmp_path / "x.nii.gz")
    assert volume.array.dtype == dtype
    assert np.array_equal(volume.array[0], labels)


def test_codes_units_and_numbers_come_from_the_scan(tmp_path: Path) -> None:
    image = nib.Nifti1Image(block(dtype=np.int16), None)
    image.set_sform(oblique(), code=4)
    image.set_qform(oblique(), code=2)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2.0, 1.0)
    image.header.set_intent("t test", (3,))
    image.header["cal_max"] = 99
    nib.save(image, tmp_path / "scan.nii")
    scan = read_volume(tmp_path / "scan.nii")
    write_label_map(tmp_path / "x.nii.gz", block(), scan.affine, like=scan.path)
    ours, theirs = nib.load(tmp_path / "x.nii.gz").header, image.header
    for name in ("sform_code", "qform_code", "xyzt_units", "quatern_b", "qoffset_x"):
        assert ours[name] == theirs[name]
    assert np.array_equal(ours["srow_x"], nib.load(scan.path).header["srow_x"])
    assert np.array_equal(read_volume(tmp_path / "x.nii.gz").affine, scan.affine)
    assert ours.get_intent()[0] == "none"
    assert ours["cal_max"] == 0
    stored = gzip.decompress((tmp_path / "x.nii.gz").read_bytes())
    assert struct.unpack_from("<ff", stored, 112) == (0, 0)  # scl_slope, scl_inter
    assert ours.get_data_dtype() == np.uint8


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("meter", 1000.0)])
def test_units_of_the_scan_hold_for_its_label_map(tmp_path: Path, unit, mm) -> None:
    image = nib.Nifti1Image(block(dtype=np.int16), oblique())
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    scan = read_volume(tmp_path / "scan.nii")
    write_label_map(tmp_path / "x.nii", block(), scan.affine, like=scan.path)
    same = nib.load(tmp_path / "x.nii")
    assert same.header.get_xyzt_units()[0] == unit
    assert np.array_equal(same.affine, nib.load(scan.path).affine)
    assert np.allclose(scan.affine[:3], same.affine[:3] * mm)
    moved = scan.affine.copy()
    moved[0, 3] += 1
    write_label_map(tmp_path / "x.nii", block(), moved, like=scan.path)
    assert nib.load(tmp_path / "x.nii").header.get_xyzt_units()[0] == "mm"
    assert np.allclose(read_volume(tmp_path / "x.nii").affine, moved)


@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (0, 0), (2, 1)])
def test_affine_survives_whatever_codes_the_scan_has(tmp_path: Path, codes) -> None:
    image = nib.Nifti1Image(block(dtype=np.int16), None)
    image.set_sform(oblique(0.3), code=codes[0])
    image.set_qform(oblique(0.7), code=codes[1])
    nib.save(image, tmp_path / "scan.nii")
    data = bytearray((tmp_path / "scan.nii").read_bytes())
    data[252:256] = np.array(codes[::-1], "<i2").tobytes()
    (tmp_path / "scan.nii").write_bytes(data)
    scan = read_volume(tmp_path / "scan.nii")
    moved = scan.affine.copy()
    moved[0, 3] += 10
    for affine in (scan.affine, moved):
        write_label_map(tmp_path / "x.nii", block(), affine, like=scan.path)
        assert np.allclose(read_volume(tmp_path / "x.nii").affine, affine, atol=1e-5)
    write_label_map(tmp_path / "x.nii", block((2, 2, 2)), scan.affine, like=scan.path)
    assert np.allclose(read_volume(tmp_path / "x.nii").affine, scan.affine, atol=1e-5)


def test_big_endian_and_packed_scan_as_model(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(block(dtype=np.int16), oblique(), header)
    nib.save(image, tmp_path / "scan.nii.gz")
    scan = read_volume(tmp_path / "scan.nii.gz")
    write_label_map(tmp_path / "x.nii", block(), scan.affine, like=scan.path)
    assert np.array_equal(read_volume(tmp_path / "x.nii").affine, scan.affine)


def test_model_of_another_format_is_no_obstacle(tmp_path: Path) -> None:
    write_label_map(tmp_path / "scan.nrrd", block(), oblique())
    write_label_map(
        tmp_path / "x.nii.gz", block(), oblique(), like=tmp_path / "scan.nrrd"
    )
    assert np.allclose(read_volume(tmp_path / "x.nii.gz").affine, oblique(), atol=1e-5)


def test_simpleitk_sees_the_same_place(tmp_path: Path) -> None:
    labels = block()
    write_label_map(tmp_path / "x.nii.gz", labels, oblique())
    image = sitk.ReadImage(str(tmp_path / "x.nii.gz"))
    point = np.array(image.TransformIndexToPhysicalPoint((2, 1, 3))) * [-1, -1, 1]
    assert np.allclose(point, (oblique() @ (2, 1, 3, 1))[:3], atol=1e-4)
    assert image.GetPixel((2, 1, 3)) == labels[2, 1, 3]


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_channels_come_back(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    write_volume(tmp_path / f"x{suffix}", Volume(array, oblique()))
    assert np.array_equal(read_volume(tmp_path / f"x{suffix}").array, array)
    assert read_header(tmp_path / f"x{suffix}").channels == 3


def test_half_floats_and_masks_are_stored_without_loss(tmp_path: Path) -> None:
    for array in (block().astype(np.float16)[None] / 8, block()[None] > 1):
        write_volume(tmp_path / "x.nii", Volume(array, np.eye(4)))
        assert np.array_equal(read_volume(tmp_path / "x.nii").array, array)
    with pytest.raises(FormatError, match="number type"):
        write_volume(tmp_path / "y.nii", Volume(array.astype(complex), np.eye(4)))


def test_very_long_axis_needs_nifti_2(tmp_path: Path) -> None:
    labels = np.zeros((33000, 1, 2), np.uint8)
    labels[-1] = 3
    write_label_map(tmp_path / "x.nii.gz", labels, np.eye(4))
    assert isinstance(nib.load(tmp_path / "x.nii.gz"), nib.Nifti2Image)
    assert np.array_equal(read_volume(tmp_path / "x.nii.gz").array[0], labels)


@pytest.mark.parametrize(
    ("name", "labels", "affine", "error", "says"),
    [
        ("x.nii", block() + 0.5, np.eye(4), FormatError, "fractions"),
        ("x.nii", block() * np.nan, np.eye(4), FormatError, "NaN"),
        ("x.nii", block() + 2**31, np.eye(4), FormatError, "too large"),
        (
            "x.nii",
            np.full((1, 1, 1), 2.0**31, "f4"),
            np.eye(4),
            FormatError,
            "too large",
        ),
        ("x.nii", block()[0], np.eye(4), GeometryError, "three axes"),
        ("x.nii", block(), np.zeros((4, 4)), GeometryError, "singular"),
        ("x.nii", block(), np.eye(3), GeometryError, "shape"),
        ("x.png", block(), np.eye(4), ConfigError, "format"),
    ],
)
def test_refusals_leave_nothing(tmp_path, name, labels, affine, error, says) -> None:
    with pytest.raises(error, match=says):
        write_label_map(tmp_path / name, labels, affine)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SCAN_SUFFIXES)
def test_full_disk_is_told_and_keeps_the_old_file(
    tmp_path, suffix, monkeypatch
) -> None:
    path = tmp_path / f"x{suffix}"
    write_label_map(path, block(), np.eye(4))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(self_or_fd, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SegMambaError, match="No space left"):
        write_label_map(path, block(high=2), np.eye(4))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label_map(tmp_path / name, block(), oblique())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
