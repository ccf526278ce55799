"""NIfTI reading against nibabel as the independent oracle, and its refusals."""

from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from segmamba.errors import FormatError, GeometryError
from segmamba.io import inflation, read_header, read_volume

DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def save(path: Path, array: np.ndarray, affine=None, order="<", cls=nib.Nifti1Image):
    header = cls.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    image = cls(array, np.eye(4) if affine is None else affine, header=header)
    nib.save(image, path)
    return path


def patch(path: Path, offset: int, fmt: str, *values: float) -> Path:
    """Overwrite header numbers of an uncompressed little-endian file."""
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, offset, *values)
    path.write_bytes(data)
    return path


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    return save(tmp_path / "cube.nii", voxels, np.diag([2.0, 3.0, 4.0, 1.0]))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
def test_types_and_byte_orders(tmp_path, code, order, suffix, cls) -> None:
    voxels = (np.arange(60) * 2).astype(order + code).reshape(3, 4, 5)
    path = save(tmp_path / f"x{suffix}", voxels, order=order, cls=cls)
    volume = read_volume(path)
    assert volume.array.dtype == np.dtype(code)
    assert volume.array.dtype.isnative
    assert volume.array.flags.writeable
    assert np.array_equal(volume.array[0], voxels)
    header = read_header(path)
    assert (header.shape, header.channels) == ((3, 4, 5), 1)
    assert header.dtype == volume.array.dtype


def signed_permutations() -> list[np.ndarray]:
    """All 48 axis orders and directions, as 3 x 3 matrices."""
    return [
        np.eye(3)[list(order)] * np.array(signs)
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]


def test_all_48_axis_orders(tmp_path: Path) -> None:
    matrices = signed_permutations()
    assert len({matrix.tobytes() for matrix in matrices}) == 48
    for matrix in matrices:
        affine = np.eye(4)
        affine[:3, :3] = matrix * [0.5, 1.25, 3.0]
        affine[:3, 3] = [-7, 11, 13]
        path = save(tmp_path / "x.nii", np.zeros((2, 3, 4), np.uint8), affine)
        assert np.array_equal(read_volume(path).affine, affine)
        assert np.array_equal(read_header(path).affine, affine)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-3, 3, width=32), min_size=12, max_size=12),
)
def test_any_regular_affine_comes_back(tmp_path_factory, numbers) -> None:
    affine = np.eye(4)
    affine[:3] = np.reshape(numbers, (3, 4))
    affine[:3, :3] += 10 * np.eye(3)  # regular: diagonally dominant
    path = tmp_path_factory.getbasetemp() / "any.nii"
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), None)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    assert np.allclose(read_volume(path).affine, affine, rtol=1e-6, atol=1e-5)


def test_sheared_sform_is_kept(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 2] = 0.3  # gantry tilt, which SimpleITK refuses
    path = save(tmp_path / "x.nii.gz", np.zeros((3, 3, 3), np.int16), affine)
    assert np.allclose(read_volume(path).affine, affine, atol=1e-6)


def test_sform_is_preferred_then_qform_then_voxel_sizes(cube: Path) -> None:
    image = nib.load(cube)
    tilted = np.array([[0, -2, 0, 5], [2, 0, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1.0]])
    image.set_qform(tilted, code=1)
    image.set_sform(np.diag([5.0, 6.0, 7.0, 1.0]), code=2)
    both = cube.with_name("both.nii")
    nib.save(image, both)
    assert np.array_equal(read_volume(both).affine, np.diag([5.0, 6.0, 7.0, 1.0]))
    patch(both, 254, "<h", 0)  # sform_code
    assert np.allclose(read_volume(both).affine, tilted, atol=1e-6)
    patch(both, 252, "<h", 0)  # qform_code
    assert np.array_equal(read_volume(both).affine, nib.load(both).affine)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("unit", ["micron", "meter", "mm", "unknown"])
def test_lengths_in_any_unit_become_mm_as_in_itk(tmp_path: Path, unit, codes) -> None:
    affine = np.diag([-50.0, -60.0, 70.0, 1.0])
    affine[:3, 3] = [100, 110, 120]
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "x.nii")
    patch(tmp_path / "x.nii", 252, "<hh", *codes[::-1])
    header, oracle = (read(tmp_path / "x.nii") for read in (read_header, _itk))
    assert np.allclose(header.spacing_mm, oracle.GetSpacing(), rtol=1e-6)
    if any(codes):  # without any, ITK puts the first voxel's centre at 0
        lps = header.affine[:3, 3] * (-1, -1, 1)
        assert np.allclose(lps, oracle.GetOrigin(), rtol=1e-5)
    assert header.notes == ()


def _itk(path: Path):
    return sitk.ReadImage(str(path))


def test_qfac_of_zero_means_one(cube: Path) -> None:
    patch(cube, 254, "<h", 0)
    patch(cube, 252, "<h", 1)
    expected = read_volume(cube).affine
    patch(cube, 76, "<f", 0.0)  # pixdim[0]
    assert np.array_equal(read_volume(cube).affine, expected)


@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -1024.0), (1.0, 5.0)])
def test_scaling_equals_nibabel(cube: Path, slope: float, intercept: float) -> None:
    patch(cube, 112, "<ff", slope, intercept)
    expected = nib.load(cube).get_fdata()
    volume = read_volume(cube)
    assert volume.array.dtype == np.float64
    assert np.array_equal(volume.array[0], expected)
    assert read_header(cube).dtype == np.float64
    single = read_volume(cube, dtype=np.float32)
    assert single.array.dtype == np.float32
    assert np.array_equal(single.array[0], expected)
    assert np.array_equal(read_volume(cube, dtype=np.int16).array[0], expected)


@pytest.mark.parametrize("slope", [0.0, float("nan"), float("inf")])
def test_slope_of_zero_or_nan_means_no_scaling(cube: Path, slope: float) -> None:
    expected = read_volume(cube).array
    patch(cube, 112, "<ff", slope, 7.0)
    assert read_volume(cube).array.dtype == np.int16
    assert np.array_equal(read_volume(cube).array, expected)


def test_fourth_and_fifth_axes_become_channels(tmp_path: Path) -> None:
    voxels = np.arange(120, dtype=np.float32).reshape(3, 4, 5, 2)
    for shape in ((3, 4, 5, 2), (3, 4, 5, 1, 2)):
        path = save(tmp_path / "x.nii.gz", voxels.reshape(shape))
        volume = read_volume(path)
        assert volume.array.shape == (2, 3, 4, 5)
        assert volume.array[1, 2, 3, 4] == voxels[2, 3, 4, 1]
        assert np.array_equal(volume.array, np.moveaxis(voxels, -1, 0))
        assert read_header(path).channels == 2


def test_time_and_vectors_together_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", np.zeros((3, 3, 3, 2, 2), np.float32))
    with pytest.raises(FormatError, match="one axis of channels"):
        read_volume(path)


def test_single_slice_gets_a_third_axis(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", np.ones((3, 4), np.uint8))
    assert read_volume(path).array.shape == (1, 3, 4, 1)


@pytest.mark.parametrize(
    "dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]]
)
def test_voxels_that_are_no_numbers_are_refused(tmp_path: Path, dtype) -> None:
    path = save(tmp_path / "x.nii", np.zeros((3, 3, 3), dtype))
    with pytest.raises(FormatError, match="integers or real numbers"):
        read_header(path)


@pytest.mark.parametrize(
    ("offset", "fmt", "values", "error", "says"),
    [
        (280, "<4f", (0, 0, 0, 0), GeometryError, "singular"),
        (280, "<4f", (float("nan"), 0, 0, 0), GeometryError, "NaN"),
        (292, "<f", (float("inf"),), GeometryError, "infinity"),
        (280, "<8f", (1, 2, 3, 0, 2, 4, 6, 0), GeometryError, "singular"),
        (42, "<h", (0,), FormatError, "at least one voxel"),
        (42, "<h", (-3,), FormatError, "at least one voxel"),
        (70, "<h", (9999,), FormatError, "unknown type 9999"),
        (108, "<f", (float("nan"),), FormatError, "vox_offset"),
        (108, "<f", (1e9,), FormatError, "truncated"),
        (112, "<ff", (2.0, float("nan")), FormatError, "scl_inter"),
        (344, "<4s", (b"ni1\0",), FormatError, "hdr/.img pair"),
    ],
)
def test_bad_header_numbers(cube, offset, fmt, values, error, says) -> None:
    patch(cube, offset, fmt, *values)
    for reader in (read_header, read_volume):
        with pytest.raises(error, match=says) as caught:
            reader(cube)
        assert str(cube) in str(caught.value)


def test_claim_beyond_the_file_is_refused_before_memory_is_taken(cube: Path) -> None:
    patch(cube, 42, "<3h", 32767, 32767, 32767)  # 70 TB
    packed = cube.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(cube.read_bytes()))
    for path in (cube, packed):
        for reader in (read_header, read_volume):
            with pytest.raises(FormatError, match="truncated"):
                reader(path)


def test_claim_just_beyond_a_packed_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", np.zeros((40, 40, 40), np.int16))
    patch(path, 42, "<h", 41)
    packed = tmp_path / "x.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(FormatError, match=r"131552 bytes by its header.*128352 bytes"):
        read_volume(packed)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_gzip_is_refused(tmp_path: Path, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 999, (30, 30, 30)).astype(np.int16)
    path = save(tmp_path / "x.nii.gz", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError):
        read_volume(path)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 999, (30, 30, 30)).astype(np.int16)
    path = save(tmp_path / "x.nii.gz", noise)
    good = path.read_bytes()
    for place in (len(good) // 2, len(good) - 6):  # inside the stream; its checksum
        data = bytearray(good)
        data[place] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(FormatError):
            read_volume(path)


def test_gzip_of_several_members(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    plain = save(tmp_path / "x.nii", voxels).read_bytes()
    path = tmp_path / "x.nii.gz"
    path.write_bytes(
        b"".join(gzip.compress(plain[i : i + 7000]) for i in range(0, len(plain), 7000))
    )
    assert np.array_equal(read_volume(path).array[0], voxels)


def test_integer_type_is_given_only_without_loss(tmp_path: Path) -> None:
    values = np.array([0, 1, 300, 2], np.float32).reshape(2, 2, 1)
    path = save(tmp_path / "x.nii.gz", values)
    assert np.array_equal(read_volume(path, dtype=np.int16).array[0], values)
    for bad, dtype, says in (
        (values, np.uint8, "from 0.0 to 300.0"),
        (values + 0.5, np.int16, "4 fractional"),
        (values * np.nan, np.int16, "NaN"),
        (np.full_like(values, 2.0**31), np.int32, "from 2147483648"),
    ):
        save(path, bad)
        with pytest.raises(FormatError, match=says):
            read_volume(path, dtype=dtype)


def test_real_scans_equal_nibabel(shared_data: Path) -> None:
    files = sorted(shared_data.glob("Task04_Hippocampus/*Tr/*_00*.nii.gz"))
    files += sorted(shared_data.glob("BraTS/BraTS2021_01476/*.nii.gz"))
    files += sorted(shared_data.glob("bad_inputs/files/nan*.nii"))
    assert len(files) > 10
    for path in files:
        volume, oracle = read_volume(path), nib.load(path)
        assert np.array_equal(volume.array[0], oracle.get_fdata(), equal_nan=True)
        assert np.array_equal(volume.affine, oracle.affine)


def test_header_reading_takes_no_voxels(shared_data: Path, monkeypatch) -> None:
    path = next(shared_data.glob("BraTS/*/*_t1.nii.gz"))

    def refuse(self):
        raise AssertionError("read the whole file")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert read_header(path).shape == (240, 240, 155)


def test_any_damage_gives_our_errors_only(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    data, rng, path = good.read_bytes(), np.random.default_rng(0), tmp_path / "x"
    for count in range(400):
        damaged = bytearray(data)
        for place in rng.integers(0, 348, 3):
            damaged[place] = rng.choice([0, 1, 127, 128, 255])
        path.write_bytes(gzip.compress(damaged) if count % 2 else damaged)
        try:
            assert read_volume(path).array.ndim == 4
        except (FormatError, GeometryError) as error:
            assert str(path) in str(error)  # noqa: PT017


def test_voxels_beyond_memory_are_refused_before_they_are_read(
    cube: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflation, "_memory_bytes", lambda: 471)
    for reader in (read_header, read_volume):
        with pytest.raises(FormatError, match="does not fit into memory"):
            reader(cube)
    monkeypatch.setattr(inflation, "_memory_bytes", lambda: 472)
    assert read_volume(cube).shape == (3, 4, 5)
