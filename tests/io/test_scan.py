"""Channels of a case, one grid or an error that says by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmamba.errors import FormatError, GeometryError
from segmamba.io import (
    Volume,
    describe_grid_difference,
    grid_distance_mm,
    read_case,
    read_volume,
    write_volume,
)


def save(path: Path, array: np.ndarray, shift_mm: float = 0.0) -> Path:
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    affine[0, 3] = shift_mm
    write_volume(path, Volume(array, affine))
    return path


def test_channels_in_the_order_of_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, 3, 4, 5)), rng.integers(0, 99, (2, 3, 4, 5))]
    paths = [
        save(tmp_path / "a.nii.gz", arrays[0].astype(np.float32)),
        save(tmp_path / "b.nrrd", arrays[1].astype(np.int16)),
    ]
    volume = read_case(paths)
    assert volume.array.dtype == np.float32
    assert volume.array.shape == (3, 3, 4, 5)
    assert np.array_equal(volume.array, np.concatenate(arrays).astype(np.float32))
    assert np.array_equal(volume.affine, np.diag([2.0, 2.0, 4.0, 1.0]))
    assert volume.path == paths[0]


def test_one_file_of_all_channels(tmp_path: Path) -> None:
    array = np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    volume = read_case([save(tmp_path / "a.nii", array)])
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype == np.float32


def test_grid_differences_are_told_in_mm_and_voxels(tmp_path: Path) -> None:
    array = np.zeros((1, 3, 4, 5), np.uint8)
    first = save(tmp_path / "a.nii", array)
    near = save(tmp_path / "near.nii", array, 0.15)
    far = save(tmp_path / "far.nii", array, 3.0)
    short = save(tmp_path / "short.nii", array[:, :2])
    read_case([first, near])
    with pytest.raises(GeometryError, match=r"3 mm \(1.5 voxels\).*far\.nii"):
        read_case([first, far])
    with pytest.raises(GeometryError, match=r"\(2, 4, 5\) instead of \(3, 4, 5\)"):
        read_case([first, short])


def test_no_images_and_missing_images(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no images"):
        read_case([])
    with pytest.raises(FormatError, match="can't open"):
        read_case([tmp_path / "none.nii"])


def test_distance_of_a_turned_grid() -> None:
    turned = np.diag([-1.0, 1.0, 1.0, 1.0])
    assert grid_distance_mm((11, 5, 5), np.eye(4), turned) == pytest.approx(20.0)
    assert describe_grid_difference((2, 2, 2), np.eye(4), (2, 2, 2), np.eye(4)) is None


def test_spacing_of_an_oblique_volume() -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.array([[3.0, -4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    volume = Volume(np.zeros((1, 2, 2, 2)), affine)
    assert volume.spacing_mm == pytest.approx((5.0, 5.0, 2.0))
    assert volume.shape == (2, 2, 2)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 2, 2, 2, 2)])
def test_volume_needs_four_axes(shape) -> None:
    with pytest.raises(GeometryError, match="four axes"):
        Volume(np.zeros(shape), np.eye(4))


def test_four_real_channels(shared_data: Path) -> None:
    paths = [
        shared_data / f"BraTS/BraTS2021_01476/BraTS2021_01476_{kind}.nii.gz"
        for kind in ("t1", "t1ce", "t2", "flair")
    ]
    volume = read_case(paths)
    assert volume.array.shape == (4, 240, 240, 155)
    for index, path in enumerate(paths):
        assert np.array_equal(volume.array[index], read_volume(path).array[0])
