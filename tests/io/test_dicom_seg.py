from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import dicom_series as make
import highdicom
import numpy as np
import pytest
from pydicom import dcmread

from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    FormatError,
    GeometryError,
)
from segmamba.io import list_series, make_segments, write_dicom_seg
from segmamba.io.dicom_segments import load_descriptions

LABELS = {"background": 0, "edema": 2, "left kidney": 1, "ball": 9}


@pytest.fixture
def label_map() -> Any:
    """Labels on some of the slices (I, J, K), none of them symmetric."""
    label_map = np.zeros(make.SHAPE[::-1], np.uint8)
    label_map[0, 1, 1] = label_map[4, 0:3, 3] = 1
    label_map[2:5, 3, 1] = label_map[5, 2, 2] = 9
    label_map[3, 1, 3] = 2
    return label_map


def read_back(path: Path, values: list[int], order: list[Any]) -> Any:
    """Read with pydicom alone: (I, J, K) by the frames' own positions."""
    data = dcmread(path)
    frames = data.pixel_array.reshape(-1, *make.SHAPE[1:])
    label_map = np.zeros(make.SHAPE, np.uint8)
    groups = data.PerFrameFunctionalGroupsSequence
    for group, frame in zip(groups, frames, strict=True):
        position = group.PlanePositionSequence[0].ImagePositionPatient
        k = round(float((position - make.ORIGIN) @ make.NORMAL) / make.SPACING[0])
        if data.SegmentationType == "BINARY":
            item = group.SegmentIdentificationSequence[0]
            label_map[k][frame == 1] = values[item.ReferencedSegmentNumber - 1]
        else:
            label_map[k] = np.array([0, *values])[frame]
    return label_map.T


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_two_other_readers_give_the_very_voxels(
    tmp_path: Path, label_map: Any, kind: Any
) -> None:
    group = make.datasets()
    series = list_series(make.write(tmp_path / "scan", group))[0]
    segments = make_segments(LABELS)
    path = tmp_path / "out" / "seg.dcm"
    write_dicom_seg(path, label_map, series, segments, kind=kind)
    np.testing.assert_array_equal(read_back(path, [1, 2, 9], group), label_map)
    read = highdicom.seg.segread(path)
    by_source = read.get_pixels_by_source_instance(
        [data.SOPInstanceUID for data in group],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(np.array([0, 1, 2, 9])[by_source].T, label_map)
    assert read.SegmentationType == kind
    assert [path.name for path in path.parent.iterdir()] == ["seg.dcm"]


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_multi_frame_sources_keep_their_order(
    tmp_path: Path, label_map: Any, kind: Any
) -> None:
    source = make.multi_frame(make.voxels(), [3, 0, 4, 2, 1])
    source.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    series = list_series(tmp_path / "enhanced.dcm")[0]
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, label_map, series, make_segments(LABELS), kind=kind)
    np.testing.assert_array_equal(read_back(path, [1, 2, 9], []), label_map)


def test_an_empty_label_map_can_be_written(tmp_path: Path) -> None:
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    nothing = np.zeros(series.shape, np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", nothing, series, make_segments(LABELS))
    assert not dcmread(tmp_path / "seg.dcm").pixel_array.any()


def test_names_codes_and_references_are_there(tmp_path: Path, label_map: Any) -> None:
    group = make.datasets()
    series = list_series(make.write(tmp_path / "scan", group))[0]
    given = {"ball": {"type": ["1", "99X", "Ball"], "color": [255, 0, 0]}}
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, label_map, series, make_segments(LABELS, given))
    data = dcmread(path)
    described = [
        (
            item.SegmentLabel,
            item.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning,
            item.SegmentedPropertyTypeCodeSequence[0].CodeValue,
            item.SegmentAlgorithmType,
        )
        for item in data.SegmentSequence
    ]
    assert described == [
        ("left kidney", "Anatomical Structure", "64033007", "AUTOMATIC"),
        ("edema", "Morphologically Abnormal Structure", "79654002", "AUTOMATIC"),
        ("ball", "Tissue", "1", "AUTOMATIC"),
    ]
    red = data.SegmentSequence[2].RecommendedDisplayCIELabValue
    lightness, a, b = np.array(red) / 65535 * [100, 255, 255] - [0, 128, 128]
    assert (lightness, a, b) == pytest.approx((53.2, 80.1, 67.2), abs=2)
    assert data.StudyInstanceUID == make.STUDY
    assert data.FrameOfReferenceUID == make.FRAME
    assert data.PatientID == "1"
    assert data.SeriesInstanceUID != group[0].SeriesInstanceUID
    referred = data.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == group[0].SeriesInstanceUID
    assert {
        i.ReferencedSOPInstanceUID for i in referred.ReferencedInstanceSequence
    } == {item.SOPInstanceUID for item in group}


def test_a_segmentation_beside_its_scan_is_no_series(
    tmp_path: Path, label_map: Any
) -> None:
    series = list_series(make.write(tmp_path, make.datasets()))[0]
    write_dicom_seg(tmp_path / "seg.dcm", label_map, series, make_segments(LABELS))
    assert [item.uid for item in list_series(tmp_path)] == [series.uid]


def test_misfits_are_refused(tmp_path: Path, label_map: Any) -> None:
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    path, segments = tmp_path / "seg.dcm", make_segments(LABELS)
    with pytest.raises(GeometryError, match=r"shape \(6, 4, 5\), found \(6, 4, 4\)"):
        write_dicom_seg(path, label_map[..., 1:], series, segments)
    with pytest.raises(ConfigError, match=r"labels without a segment.*\[9\]"):
        write_dicom_seg(path, label_map, series, segments[:2])
    bad: Any = "FRACTIONAL"
    with pytest.raises(ConfigError, match="BINARY or LABELMAP, found FRACTIONAL"):
        write_dicom_seg(path, label_map, series, segments, kind=bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="can't write a DICOM-SEG"):
        write_dicom_seg(tmp_path / "file" / "seg.dcm", label_map, series, segments)
    assert not path.exists()


def test_headers_that_lack_too_much_are_named(tmp_path: Path, label_map: Any) -> None:
    group = make.datasets()
    for data in group:
        del data.FrameOfReferenceUID
    series = list_series(make.write(tmp_path / "scan", group))[0]
    with pytest.raises(FormatError, match=r"can't make a DICOM-SEG.*series 3"):
        write_dicom_seg(tmp_path / "s.dcm", label_map, series, make_segments(LABELS))
    assert not (tmp_path / "s.dcm").exists()


def test_without_highdicom_the_remedy_is_named(
    tmp_path: Path, label_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    segments = make_segments(LABELS)
    monkeypatch.setitem(sys.modules, "highdicom.seg", None)
    with pytest.raises(BackendUnavailableError, match=r"highdicom.*segmamba\[dicom"):
        write_dicom_seg(tmp_path / "s.dcm", label_map, series, segments)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("hippocampus", "Hippocampus"),
        ("kidney_right", "Kidney"),
        ("Tumour", "Neoplasm"),
        ("necrosis", "Necrosis"),
        ("enhancing tumor", "Enhancing Lesion"),
        ("ED", "Edema"),
        ("thing", "Tissue"),
    ],
)
def test_common_names_have_codes(name: str, meaning: str) -> None:
    (segment,) = make_segments({"background": 0, name: 1})
    assert segment.kind[2] == meaning
    assert segment.name == name


def test_colours_differ() -> None:
    segments = make_segments({f"s{k}": k for k in range(20)})
    assert len({segment.color for segment in segments}) == 19


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"liver": {}}, "no label of the model: expected .*ball, found liver"),
        ({"ball": {"colour": [0, 0, 0]}}, "expected category, color, type"),
        ({"ball": {"color": [0, 0, 256]}}, "three integers from 0 to 255"),
        ({"ball": {"type": ["1", "SCT"]}}, "three texts"),
        ({"ball": {"category": ["1" * 17, "SCT", "x"]}}, "three texts"),
    ],
)
def test_bad_descriptions_are_refused(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_segments(LABELS, given)


def test_descriptions_are_read_from_json(tmp_path: Path) -> None:
    path = tmp_path / "segments.json"
    path.write_text(json.dumps({"ball": {"color": [1, 2, 3]}}))
    assert load_descriptions(path) == {"ball": {"color": [1, 2, 3]}}
    for bad in ("[]", '{"ball": 1}'):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="bad description of segments"):
            load_descriptions(path)
