"""From a DICOM folder to label maps, by the command line's own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dicom_series as make
import highdicom
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid

from segmamba import cli
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, FormatError
from segmamba.inference import find_cases, load_model
from segmamba.inference.dicom_study import named_values
from segmamba.io import read_dicom, read_volume, write_volume

BRATS = ("T1", "T1ce", "T2", "FLAIR")


@pytest.fixture
def ball(tmp_path: Path) -> Path:
    """A bright ball on noise, as the trained network of the project knows it."""
    random = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"))
    inside = ((grid - 10) ** 2).sum(0) < 25
    stored = (random.normal(100, 10, (20, 20, 20)) + 100 * inside).astype(np.int16)
    return make.write(tmp_path / "scan7", make.datasets(stored))


def test_predict_writes_nifti_and_dicom_seg(
    project: Path, ball: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    words = ["predict", str(project / "run"), str(ball), "-o", str(out), "--no-mirror"]
    assert cli.main([*words, "--dicom-seg", "--device", "cpu"]) == 0
    label = read_volume(out / "scan7.nii.gz")
    scan = read_dicom(ball)
    np.testing.assert_allclose(label.affine, scan.affine, atol=1e-4)
    # What is written is what the same voxels as NIfTI give.
    write_volume(tmp_path / "same.nii.gz", scan)
    model = load_model(project / "run", "cpu", mirror=False)
    expected = model.predict(tmp_path / "same.nii.gz").label_map
    assert expected.any()
    np.testing.assert_array_equal(label.array[0], expected)
    read = highdicom.seg.segread(out / "scan7.dcm")
    uids = [dcmread(path).SOPInstanceUID for path in sorted(ball.iterdir(), key=_slice)]
    frames = read.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames.T, expected)
    assert read.get_segment_description(1).SegmentLabel == "ball"
    # A finished case is left alone, until its segmentation is gone.
    assert cli.main([*words, "--dicom-seg"]) == 0
    assert "1 already there" in capsys.readouterr().out
    (out / "scan7.dcm").unlink()
    assert cli.main([*words, "--dicom-seg", "--seg-type", "LABELMAP"]) == 0
    assert dcmread(out / "scan7.dcm").SegmentationType == "LABELMAP"


def test_predict_writes_rtstruct_beside_it(
    project: Path, ball: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["predict", str(project / "run"), str(ball), "-o", str(out), "--no-mirror"]
    assert cli.main([*words, "--dicom-seg", "--rtstruct", "--device", "cpu"]) == 0
    data = dcmread(out / "scan7_rtstruct.dcm")
    assert data.StructureSetROISequence[0].ROIName == "ball"
    assert data.ROIContourSequence[0].ContourSequence
    assert dcmread(out / "scan7.dcm").Modality == "SEG"
    record = json.loads((out / "manifest.json").read_text())
    assert record["wanted"]["dicom"] == ["BINARY", "RTSTRUCT"]
    names = [row["path"] for row in record["cases"]["scan7"]["outputs"]]
    assert names == ["scan7.nii.gz", "scan7.dcm", "scan7_rtstruct.dcm"]
    (inputs,) = record["cases"]["scan7"]["inputs"]
    assert inputs["files"] == 20
    (out / "scan7_rtstruct.dcm").unlink()
    file = tmp_path / "a.nii.gz"
    assert cli.main([*words[:4], str(file), "--no-mirror", "--rtstruct"]) == 0
    assert (tmp_path / "a_rtstruct.dcm").is_file()


def _slice(path: Path) -> int:
    return int(dcmread(path).InstanceNumber)


def test_dicom_seg_of_other_scans_is_refused(project: Path, tmp_path: Path) -> None:
    words = ["predict", str(project / "run"), str(project / "scan.nii.gz")]
    assert cli.main([*words, "-o", str(tmp_path / "out"), "--dicom-seg"]) == 1
    assert not (tmp_path / "out").exists()


def test_bad_segments_are_refused_before_any_work(
    project: Path, ball: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "segments.json"
    file.write_text(json.dumps({"liver": {}}))
    words = ["predict", str(project / "run"), str(ball), "-o", str(tmp_path / "out")]
    assert cli.main([*words, "--dicom-seg", "--segments", str(file)]) == 1
    captured = capsys.readouterr()
    assert "liver" in captured.out + captured.err
    assert not (tmp_path / "out").exists()


def test_series_are_matched_to_channels_by_description(tmp_path: Path) -> None:
    names = ["AX T1 pre", "ax T1 POST", "T2_reg", "T2 FLAIR", "localizer"]
    for number, name in enumerate(names, start=1):
        group = make.datasets(number=number, description=name)
        make.write(tmp_path / "study" / str(number), group)
    (case,) = find_cases(tmp_path / "study", BRATS)
    assert case.id == "study"
    assert [series.number for series in case.series] == [1, 2, 3, 4]
    (case,) = find_cases(tmp_path / "study", BRATS, series=["4", "3", "post", "1"])
    assert [series.number for series in case.series] == [4, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"expected 4 \(T1, T1ce.*found 1, 2"):
        find_cases(tmp_path / "study", BRATS, series=["1", "2"])


def test_a_real_study_is_matched_by_its_descriptions(shared_data: Path) -> None:
    source = shared_data / "dicom_study1" / "full_study.tar.xz"
    (case,) = find_cases(source, BRATS)
    assert case.id == "full_study"
    assert [series.description for series in case.series] == [
        *("T1pre_reg", "T1post", "T2_reg", "FLAIR_reg")
    ]


def test_unclear_series_are_listed(tmp_path: Path) -> None:
    for number in (1, 2):
        make.write(tmp_path / str(number), make.datasets(number=number))
    with pytest.raises(ConfigError, match=r"not clear.*1: T1 ax.*2: T1 ax.*--series"):
        find_cases(tmp_path, ["MRI"])
    (case,) = find_cases(tmp_path, ["MRI"], series=["2"])
    assert [series.number for series in case.series] == [2]


def test_each_study_is_a_case_and_a_broken_one_stops_no_other(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        group = make.datasets(study=generate_uid())
        make.write(tmp_path / name / "deep", group)
    group = make.datasets(study=generate_uid())
    make.write(tmp_path / "p3", [group[0], *group[2:]])
    first, second, third = find_cases(tmp_path, ["MRI"])
    assert (first.id, second.id, third.id) == ("p1", "p2", "p3")
    assert len(first.series) == len(second.series) == 1
    assert first.problem is second.problem is None
    assert third.problem is not None
    assert "lacks slices" in third.problem


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("DICOM/p1", "DICOM/p2"), ["p1", "p2"]),
        (("p1/s1", "p1/s2", "p2/s1"), ["p1_s1", "p1_s2", "p2_s1"]),
        (("p1/CT/1", "p2/CT/1"), ["p1", "p2"]),
        (("a", "b/c/d"), ["a", "b"]),
    ],
)
def test_studies_are_called_as_the_folders_that_part_them(
    tmp_path: Path, folders: tuple[str, ...], names: list[str]
) -> None:
    for folder in folders:
        make.write(tmp_path / folder, make.datasets(study=generate_uid()))
    assert [case.id for case in find_cases(tmp_path, ["MR"])] == names


def test_studies_in_one_folder_are_called_by_their_uids(tmp_path: Path) -> None:
    for end in ("7", "8"):
        make.write(tmp_path / "d", make.datasets(study=f"1.2.{end}"), start=end)
    found = find_cases(tmp_path / "d", ["MR"])
    assert [case.id for case in found] == ["d_7", "d_8"]


def test_folders_without_dicom_say_so_as_before(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(FormatError, match="no scan found"):
        find_cases(tmp_path, ["MRI"])


def test_every_value_of_a_label_map_has_a_name() -> None:
    scheme = LabelScheme(
        labels={"background": 0, "edema": 2},
        regions={"whole": (1, 2), "core": (1,)},
        regions_order=(2, 1),
    )
    assert named_values(scheme) == {"background": 0, "edema": 2, "core": 1}
