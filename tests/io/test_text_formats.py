"""NRRD and MHA against ITK: axis order, LPS to RAS, channels, and refusals."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segmamba.errors import FormatError, GeometryError
from segmamba.io import Volume, read_header, read_volume, write_volume

SUFFIXES = [".nrrd", ".mha"]

NRRD = """NRRD0004
type: {type}
dimension: 3
space: {space}
sizes: 2 3 4
space directions: {directions}
kinds: domain domain domain
endian: little
encoding: {encoding}
space origin: (10,20,30)

"""


def nrrd_file(path: Path, cut: int = 0, **changes: str) -> Path:
    """Write an NRRD by hand, uint8 voxels 0 to 23 with the first axis fastest."""
    values = {
        "type": "uint8",
        "space": "left-posterior-superior",
        "directions": "(2,0,0) (0,3,0) (0,0,4)",
        "encoding": "raw",
        **changes,
    }
    voxels = bytes(range(24))
    if values["encoding"] == "gzip":
        voxels = gzip.compress(voxels)
    path.write_bytes(NRRD.format(**values).encode() + voxels[: len(voxels) - cut])
    return path


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_hand_written_nrrd(tmp_path: Path, encoding: str) -> None:
    volume = read_volume(nrrd_file(tmp_path / "x.nrrd", encoding=encoding))
    assert volume.array.shape == (1, 2, 3, 4)
    assert volume.array[0, 1, 0, 0] == 1
    assert volume.array[0, 0, 1, 0] == 2
    assert volume.array[0, 0, 0, 1] == 6
    assert volume.array.flags.writeable
    expected = np.diag([-2.0, -3.0, 4.0, 1.0])
    expected[:3, 3] = [-10, -20, 30]
    assert np.array_equal(volume.affine, expected)


def test_nrrd_in_ras_means_the_same_place(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", space="right-anterior-superior")
    expected = np.diag([2.0, 3.0, 4.0, 1.0])
    expected[:3, 3] = [10, 20, 30]
    assert np.allclose(read_volume(path).affine, expected)


@pytest.mark.parametrize(
    "name",
    ["uchar", "unsigned char", "uint8_t", "int8", "signed char"],
)
def test_spellings_of_number_types(tmp_path: Path, name: str) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", type=name)
    assert read_volume(path).array.max() == 23


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_geometry_is_what_itk_computes(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 1000, (5, 4, 3)).astype(np.int16)  # z, y, x
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 1.5, 3.0))
    image.SetOrigin((-12.0, 34.0, 56.0))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    image.SetDirection(rotation.ravel())
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    for index in ((0, 0, 0), (2, 3, 4), (1, 0, 2)):
        point = image.TransformIndexToPhysicalPoint(index)
        ours = volume.affine @ (*index, 1)
        assert np.allclose(ours[:3], np.array(point) * [-1, -1, 1], atol=1e-5)
        assert volume.array[(0, *index)] == image.GetPixel(index)
    header = read_header(path)
    assert header.shape == (3, 4, 5)
    assert header.dtype == np.int16
    assert np.array_equal(header.affine, volume.affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("vectors", [True, False])
def test_channels(tmp_path: Path, suffix: str, vectors: bool) -> None:
    voxels = np.arange(120, dtype=np.float32).reshape(2, 5, 4, 3)  # c, z, y, x
    if vectors:
        image = sitk.GetImageFromArray(np.moveaxis(voxels, 0, -1), isVector=True)
    else:
        image = sitk.GetImageFromArray(voxels, isVector=False)
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read_volume(path)
    assert volume.array.shape == (2, 3, 4, 5)
    assert np.array_equal(volume.array, voxels.transpose(0, 3, 2, 1))
    assert read_header(path).channels == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("code", ["u1", "i1", "i2", "u2", "i4", "f4", "f8"])
def test_types(tmp_path: Path, suffix: str, code: str) -> None:
    array = np.arange(24).reshape(1, 2, 3, 4).astype(code)
    path = tmp_path / f"x{suffix}"
    write_volume(path, Volume(array, np.eye(4)))
    assert read_volume(path).array.dtype == np.dtype(code)
    assert read_header(path).dtype == np.dtype(code)
    assert np.array_equal(read_volume(path).array, array)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("code", ["u1", "i2", "u4", "i8", "f4", "f8"])
def test_itk_reads_what_is_written(tmp_path, suffix, channels, code) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 100, (channels, 3, 4, 5)).astype(code)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * [0.5, 1.5, 3.0]
    affine[:3, 3] = [-12.5, 34.25, 7.0]
    path = tmp_path / f"x{suffix}"
    write_volume(path, Volume(array, affine))
    image = sitk.ReadImage(str(path))
    assert image.GetSize() == (3, 4, 5)
    assert image.GetNumberOfComponentsPerPixel() == channels
    voxels = sitk.GetArrayFromImage(image).reshape(5, 4, 3, channels)
    assert voxels.dtype == np.dtype(code)
    assert np.array_equal(voxels.transpose(3, 2, 1, 0), array)
    point = np.array(image.TransformIndexToPhysicalPoint((2, 1, 4))) * [-1, -1, 1]
    assert np.allclose(point, (affine @ (2, 1, 4, 1))[:3], atol=1e-6)


@pytest.mark.parametrize(
    "kinds", ["vector domain domain domain", "??? space space space"]
)
def test_nrrd_channel_axis_by_kind(tmp_path: Path, kinds: str) -> None:
    head = (
        "NRRD0004\ntype: uint8\ndimension: 4\nsizes: 2 3 4 5\n"
        f"spacings: nan 1 2 3\nkinds: {kinds}\nencoding: raw\n\n"
    )
    path = tmp_path / "x.nrrd"
    path.write_bytes(head.encode() + bytes(range(120)))
    volume = read_volume(path)
    assert volume.array.shape == (2, 3, 4, 5)
    assert volume.array[1, 2, 0, 0] == 1 + 2 * 2
    assert volume.spacing_mm == (1, 2, 3)


def test_nrrd_last_of_four_axes_is_the_channels_without_a_hint(tmp_path: Path) -> None:
    head = "NRRD0001\r\ntype: uchar\r\ndimension: 4\r\nsizes: 2 3 4 5\r\n"
    path = tmp_path / "x.nrrd"
    path.write_bytes(head.encode() + b"encoding: raw\r\n\r\n" + bytes(range(120)))
    volume = read_volume(path)
    assert volume.array.shape == (5, 2, 3, 4)
    assert volume.array[1, 1, 0, 0] == 24 + 1


@pytest.mark.parametrize("skip", ["byte skip: -1", "byte skip: 5", "line skip: 1"])
def test_nrrd_skips(tmp_path: Path, skip: str) -> None:
    path = nrrd_file(tmp_path / "x.nrrd")
    head, voxels = path.read_bytes().split(b"\n\n", 1)
    path.write_bytes(head + f"\n{skip}\n\n".encode() + b"abcd\n" + voxels)
    assert read_volume(path).array.ravel(order="F").tolist() == list(range(24))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoding: raw", "encoding: hex"),
        ("type: uint8", "type: block"),
        ("sizes: 2 3 4", "sizes: 2 3 x"),
        ("sizes: 2 3 4", "sizes: 2 3"),
        ("sizes: 2 3 4", "sizes: 2 0 4"),
        ("dimension: 3", "dimension: 4"),
        ("endian: little", "endian: middle"),
        ("(2,0,0)", "(2,0)"),
        ("(2,0,0)", "none"),
        ("endian: little", "byte skip: -7"),
        ("endian: little", "line skip: 9"),
    ],
)
def test_unusable_nrrd_headers(tmp_path: Path, old: str, new: str) -> None:
    path = nrrd_file(tmp_path / "x.nrrd")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(FormatError, match=r"x\.nrrd"):
        read_header(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NDims = 3", "NDims = 2"),
        ("ElementType = MET_UCHAR", "ElementType = MET_STRING"),
        ("BinaryData = True", "BinaryData = False"),
        ("ElementDataFile = LOCAL", "ElementDataFile = ../x.raw"),
        ("ElementDataFile = LOCAL", "ElementDataFile = /etc/passwd"),
        ("ElementDataFile = LOCAL", "ElementDataFile = C:x.raw"),
        ("ElementDataFile = LOCAL", "ElementDataFile = LIST"),
        ("ElementDataFile = LOCAL", "ElementDataFile = x%03d.raw 1 4 1"),
        ("ElementDataFile = LOCAL", "ElementDataFile = gone.raw"),
        ("BinaryData = True", "HeaderSize = -7"),
        ("ElementDataFile = LOCAL", "ElementDataFile"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 1"),
        ("DimSize = 2 3 4", "DimSize = 2 3 -4"),
        ("Offset = 0 0 0", "Offset = 0 zero 0"),
    ],
)
def test_unusable_mha_headers(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3, 2), np.uint8)), str(path))
    assert old.encode() in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(FormatError, match=r"x\.mha"):
        read_header(path)


def test_packed_nrrd_is_told_apart(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "x.nrrd")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(FormatError, match="packed by gzip"):
        read_header(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_damage_gives_our_errors_only(tmp_path: Path, suffix: str) -> None:
    good = tmp_path / f"good{suffix}"
    write_volume(good, Volume(np.arange(60).reshape(1, 3, 4, 5) % 7, np.eye(4)))
    data, rng, path = good.read_bytes(), np.random.default_rng(0), tmp_path / "x"
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.choice([0, 10, 32, 45, 48, 57, 255])
        path.write_bytes(damaged)
        try:
            assert read_volume(path).array.ndim == 4
        except (FormatError, GeometryError) as error:
            assert str(path.parent) in str(error)  # noqa: PT017


def test_big_endian_nrrd(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", type="short")
    values = np.arange(24, dtype=">i2")
    head = path.read_bytes().split(b"\n\n")[0].replace(b"little", b"big")
    path.write_bytes(head + b"\n\n" + values.tobytes())
    assert np.array_equal(read_volume(path).array.ravel(order="F"), values)
    assert read_volume(path).array.dtype.isnative


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("cut", [12, 20])
def test_truncated_nrrd(tmp_path: Path, encoding: str, cut: int) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", cut=cut, encoding=encoding)
    assert path.stat().st_size > 24  # so the header's bytes must not count as voxels
    with pytest.raises(FormatError, match=r"x\.nrrd"):
        read_volume(path)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_a_file(tmp_path: Path, suffix: str, compressed: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8)
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(path), compressed)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(FormatError):
        read_volume(path)


def test_huge_claims_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "x.nrrd")
    path.write_bytes(path.read_bytes().replace(b"2 3 4\n", b"90000 90000 90000\n"))
    with pytest.raises(FormatError, match="truncated"):
        read_header(path)
    mha = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3, 2), np.uint8)), str(mha))
    mha.write_bytes(mha.read_bytes().replace(b"2 3 4", b"90000 90000 90000"))
    with pytest.raises(FormatError, match="truncated"):
        read_header(mha)


@pytest.mark.parametrize(
    "directions",
    ["(0,0,0) (0,3,0) (0,0,4)", "(2,0,0) (2,0,0) (0,0,4)", "(nan,0,0) (0,3,0) (0,0,4)"],
)
def test_bad_directions(tmp_path: Path, directions: str) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", directions=directions)
    with pytest.raises((GeometryError, FormatError), match=r"x\.nrrd"):
        read_header(path)


def test_zero_spacing_in_mha(tmp_path: Path) -> None:
    path = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3, 2), np.uint8)), str(path))
    path.write_bytes(
        path.read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 0 1")
    )
    with pytest.raises(GeometryError, match="sizes in mm above 0, found"):
        read_header(path)


def test_detached_voxels_are_refused(tmp_path: Path) -> None:
    path = nrrd_file(tmp_path / "x.nrrd")
    text = path.read_bytes().replace(b"encoding", b"data file: x.raw\nencoding")
    path.write_bytes(text)
    with pytest.raises(FormatError, match="in one file"):
        read_header(path)


def test_flat_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3), np.uint8)), str(path))
    with pytest.raises(FormatError, match="three axes"):
        read_header(path)


def test_nothing_is_printed(tmp_path: Path, capfd) -> None:
    path = nrrd_file(tmp_path / "x.nrrd", cut=12, encoding="gzip")
    with pytest.raises(FormatError):
        read_volume(path)
    sheared = nrrd_file(tmp_path / "s.nrrd", directions="(2,0,0) (0.5,3,0) (0,0,4)")
    affine = read_volume(sheared).affine
    assert affine[0, 1] == pytest.approx(-0.5)
    assert affine[1, 1] == pytest.approx(-3.0)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
