"""The fourth axis as frames: each is a case, in data sets and in predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmamba import cli
from segmamba.data.cache import build_cache
from segmamba.data.check import check_dataset
from segmamba.data.dataset import dataset_from_dict, dataset_to_dict
from segmamba.data.fingerprint import make_fingerprint
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import load_plan
from segmamba.errors import FormatError
from segmamba.inference.find import find_cases
from segmamba.io import Volume, read_volume, write_label_map, write_volume

AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def cine(path: Path, sources: list[Path]) -> Path:
    """Join scans as the frames of one."""
    frames = [read_volume(source).array[0] for source in sources]
    write_volume(path, Volume(np.stack(frames), AFFINE))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two rows of frames 0 and 2 of one image."""
    array = np.random.default_rng(0).normal(size=(3, 9, 8, 7)).astype(np.float32)
    write_volume(tmp_path / "cine.nii.gz", Volume(array, AFFINE))
    for frame in (0, 2):
        labels = (array[frame] > 0.5).astype(np.uint8)
        write_label_map(tmp_path / f"label_{frame}.nii.gz", labels, AFFINE)
    rows = [f"cine.nii.gz,{frame},label_{frame}.nii.gz\n" for frame in (0, 2)]
    (tmp_path / "cases.csv").write_text("image,frame,label\n" + "".join(rows))
    return tmp_path / "cases.csv"


def test_rows_of_a_table_name_frames(table: Path) -> None:
    dataset = load_dataset(table)
    assert dataset.channels == ("image",)
    found = [(case.id, case.frame) for case in dataset.cases]
    assert found == [("cine_frame_0", 0), ("cine_frame_2", 2)]
    assert check_dataset(dataset).problems == ()
    assert dataset_from_dict(dataset_to_dict(dataset)).cases == dataset.cases


def test_measures_and_caches_are_those_of_the_frame(
    table: Path, tmp_path: Path, project: Path
) -> None:
    dataset, plan = load_dataset(table), load_plan(project / "run" / "plan.json")
    fingerprint = make_fingerprint(dataset)
    voxels = read_volume(tmp_path / "cine.nii.gz").array
    for case, frame in zip(fingerprint.cases, (0, 2), strict=True):
        assert case.label_voxels["label 1"] == np.count_nonzero(voxels[frame] > 0.5)
    cache = build_cache(dataset, plan, tmp_path / "cache")
    images = [np.asarray(cache.load(name).image) for name in cache.case_ids]
    assert images[0].shape[0] == 1
    assert not np.array_equal(*images)
    table.write_text(table.read_text().replace(",2,", ",1,"))
    changed = build_cache(load_dataset(table), plan, tmp_path / "cache")
    assert changed.case_ids == ("cine_frame_0", "cine_frame_1")


@pytest.mark.parametrize("cell", ["-1", "x", "1.5", "9" * 12])
def test_frames_that_are_no_numbers_are_refused(table: Path, cell: str) -> None:
    table.write_text(table.read_text().replace(",2,", f",{cell},"))
    with pytest.raises(FormatError, match=r"whole numbers from 0 up.*cases\.csv"):
        load_dataset(table)


def test_a_frame_beyond_the_last_is_named(table: Path) -> None:
    table.write_text(table.read_text().replace(",2,", ",3,"))
    (problem,) = check_dataset(load_dataset(table)).errors
    assert "no such frame: expected 0 to 2, found 3" in problem.message


def test_each_frame_is_found_by_option(tmp_path: Path) -> None:
    for name, count in (("long", 11), ("short", 1)):
        array = np.zeros((count, 4, 4, 4), np.int16)
        array[-1] = 7
        write_volume(tmp_path / f"{name}.nii.gz", Volume(array, AFFINE))
    cases = find_cases(tmp_path, ["MR"], frames=True)
    assert [case.id for case in cases][9:] == [
        *("long_frame_09", "long_frame_10", "short_frame_0")
    ]
    scan = cases[10].scan()
    assert isinstance(scan, Volume)
    assert scan.array.shape == (1, 4, 4, 4)
    assert scan.array.min() == 7
    assert [case.frame for case in find_cases(tmp_path, ["MR"])] == [None, None]


def test_a_broken_file_is_left_to_be_reported(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").write_bytes(b"no scan")
    (case,) = find_cases(tmp_path, ["MR"], frames=True)
    assert (case.id, case.frame) == ("x", None)


def test_predict_segments_frame_by_frame(project: Path, tmp_path: Path) -> None:
    names = ["case_0", "case_3"]
    scan = cine(
        tmp_path / "cine.nii.gz",
        [project / "scans" / f"{name}.nii.gz" for name in names],
    )
    output = tmp_path / "out"
    words = ["predict", str(project / "run"), str(scan), "-o", str(output)]
    options = ["--no-mirror", "--device", "cpu"]
    assert cli.main([*words, *options, "--frames"]) == 0
    for frame, name in enumerate(names):
        found = read_volume(output / f"cine_frame_{frame}.nii.gz")
        expected = read_volume(project / "predictions" / f"{name}.nii.gz")
        assert np.array_equal(found.array, expected.array)
        assert np.array_equal(found.affine, expected.affine)
    assert cli.main([*words[:4], str(tmp_path / "other"), *options]) == 1
