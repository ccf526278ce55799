"""RTSTRUCT: read back by another library's polygons, to the very voxels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dicom_series as make
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from pydicom import dcmread

from segmamba.errors import ConfigError, FormatError, GeometryError
from segmamba.io import list_series, make_segments, write_dicom_rtstruct
from segmamba.io.dicom_rtstruct import contours

LABELS = {"background": 0, "edema": 2, "left kidney": 1, "ball": 9}


def holds(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Say which voxel centres lie in a polygon (even-odd), by matplotlib."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    # A nudge, the same for all, off the cuts that join holes.
    places = grid.reshape(-1, 2) + np.array([1.3e-3, 0.7e-3])
    closed = np.concatenate([points, points[:1]])
    return Polygon(closed, closed=True).contains_points(places).reshape(shape)


def filled(mask: np.ndarray) -> np.ndarray:
    found = np.zeros(mask.shape, bool)
    for points in contours(mask):
        inside = holds(points, mask.shape)
        assert not (found & inside).any()  # outlines of one label never overlap
        found |= inside
    return found


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_any_mask_comes_back(rows: int, columns: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < share
    np.testing.assert_array_equal(filled(mask), mask)


def test_rings_within_rings_come_back() -> None:
    grid = np.stack(np.meshgrid(np.arange(41), np.arange(37), indexing="ij"))
    radius = np.hypot(grid[0] - 20, grid[1] - 18)
    mask = (radius < 17) & ((radius % 6) < 3.2)
    mask[30, 18] = mask[10, 18] = False
    np.testing.assert_array_equal(filled(mask), mask)
    assert not list(contours(np.zeros((4, 5), bool)))


def test_straight_edges_have_no_points_between() -> None:
    mask = np.zeros((30, 20), bool)
    mask[3:27, 2:18] = True
    (points,) = contours(mask)
    assert len(points) == 8  # corners are cut


@pytest.fixture
def label_map() -> Any:
    """Labels on some of the slices (I, J, K), none of them symmetric."""
    label_map = np.zeros(make.SHAPE[::-1], np.uint8)
    label_map[0, 1, 1] = label_map[4, 0:3, 3] = 1
    label_map[0:5, 0:4, 4] = 1
    label_map[1:3, 1:3, 4] = 0  # a hole
    label_map[2:5, 3, 1] = label_map[5, 2, 2] = 9
    label_map[3, 1, 3] = 2
    return label_map


def read_back(path: Path, sources: dict[str, int]) -> Any:
    """Read with pydicom and matplotlib alone: (I, J, K) by places in the patient."""
    data = dcmread(path)
    numbers = {roi.ROINumber: roi.ROIName for roi in data.StructureSetROISequence}
    label_map = np.zeros(make.SHAPE[::-1], np.uint8)
    for roi in data.ROIContourSequence:
        value = LABELS[numbers[roi.ReferencedROINumber]]
        for item in roi.get("ContourSequence", ()):
            places = np.reshape(item.ContourData, (-1, 3)).astype(float) - make.ORIGIN
            assert len(places) == item.NumberOfContourPoints
            slices = places @ make.NORMAL / make.SPACING[0]
            k = round(float(slices[0]))
            np.testing.assert_allclose(slices, k, atol=1e-3)
            image = item.ContourImageSequence[0]
            frame = image.get("ReferencedFrameNumber", 1)
            assert sources[f"{image.ReferencedSOPInstanceUID} {frame}"] == k
            i = places @ make.ROW / make.SPACING[2]
            j = places @ make.COLUMN / make.SPACING[1]
            plane = holds(np.column_stack([i, j]), label_map.shape[:2])
            label_map[plane, k] = value
    return label_map


def test_another_reader_gives_the_very_voxels(tmp_path: Path, label_map: Any) -> None:
    group = make.datasets()
    series = list_series(make.write(tmp_path / "scan", group))[0]
    path = tmp_path / "out" / "rt.dcm"
    write_dicom_rtstruct(path, label_map, series, make_segments(LABELS))
    sources = {f"{data.SOPInstanceUID} 1": k for k, data in enumerate(group)}
    np.testing.assert_array_equal(read_back(path, sources), label_map)
    assert [item.name for item in path.parent.iterdir()] == ["rt.dcm"]
    assert len(list_series(tmp_path)) == 1  # an RTSTRUCT is no scan


def test_frames_of_one_file_are_named(tmp_path: Path, label_map: Any) -> None:
    order = [3, 0, 4, 2, 1]
    source = make.multi_frame(make.voxels(), order)
    source.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    series = list_series(tmp_path / "enhanced.dcm")[0]
    path = tmp_path / "rt.dcm"
    write_dicom_rtstruct(path, label_map, series, make_segments(LABELS))
    sources = {f"{source.SOPInstanceUID} {n + 1}": k for n, k in enumerate(order)}
    np.testing.assert_array_equal(read_back(path, sources), label_map)


def test_the_standards_tags_are_there(tmp_path: Path, label_map: Any) -> None:
    """By the tables of the standard that highdicom carries."""
    import highdicom

    tables = Path(highdicom.__file__).parent / "_standard"
    modules = json.loads((tables / "iod_module_map.json").read_text())
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    write_dicom_rtstruct(tmp_path / "rt.dcm", label_map, series, make_segments(LABELS))
    data = dcmread(tmp_path / "rt.dcm")
    checked = 0
    for module in modules["rt-structure-set"]:
        if module["usage"] != "M" and module["key"] != "frame-of-reference":
            continue
        for attribute in attributes[module["key"]]:
            checked += check_attribute(data, attribute)
    assert checked > 30
    del data.StructureSetLabel
    with pytest.raises(AssertionError, match="StructureSetLabel"):
        [check_attribute(data, tag) for tag in attributes["structure-set"]]


def check_attribute(data: Any, attribute: dict[str, Any]) -> int:
    """See that a tag of type 1 has a value, and that one of type 2 is there."""
    groups = [data]
    for step in attribute["path"]:
        groups = [item for group in groups for item in group.get(step) or ()]
    for group in groups if attribute["type"] in ("1", "2") else ():
        assert attribute["keyword"] in group, attribute["keyword"]
        if attribute["type"] == "1":
            assert group[attribute["keyword"]].value not in (None, ""), attribute
    return len(groups)


def test_names_codes_colours_and_references(tmp_path: Path, label_map: Any) -> None:
    group = make.datasets()
    series = list_series(make.write(tmp_path / "scan", group))[0]
    given = {"ball": {"type": ["1", "99X", "Ball"], "color": [255, 0, 7]}}
    path = tmp_path / "rt.dcm"
    write_dicom_rtstruct(path, label_map, series, make_segments(LABELS, given))
    data = dcmread(path)
    names = [roi.ROIName for roi in data.StructureSetROISequence]
    assert names == ["left kidney", "edema", "ball"]
    assert list(data.ROIContourSequence[2].ROIDisplayColor) == [255, 0, 7]
    kidney, _, ball = data.RTROIObservationsSequence
    assert kidney.RTROIInterpretedType == "ORGAN"
    assert ball.RTROIInterpretedType == ""
    assert ball.RTROIIdentificationCodeSequence[0].CodeMeaning == "Ball"
    assert data.StudyInstanceUID == make.STUDY
    assert data.PatientID == "1"
    frame = data.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == make.FRAME
    study = frame.RTReferencedStudySequence[0]
    referred = study.RTReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == group[0].SeriesInstanceUID
    assert [image.ReferencedSOPInstanceUID for image in referred.ContourImageSequence]
    assert len(referred.ContourImageSequence) == len(group)


def test_long_contours_can_be_written(tmp_path: Path) -> None:
    """Beyond the 64 KiB that a text of an explicit type may have."""
    stored = np.zeros((2, 1600, 6), np.int16)
    series = list_series(make.write(tmp_path / "scan", make.datasets(stored)))[0]
    comb = np.zeros((6, 1600, 2), np.uint8)
    comb[:, ::2], comb[0] = 1, 1
    segments = make_segments({"background": 0, "comb": 1})
    write_dicom_rtstruct(tmp_path / "rt.dcm", comb, series, segments)
    drawn = dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ContourSequence
    assert len("\\".join(map(str, drawn[0].ContourData))) > 2**16
    assert drawn[0].NumberOfContourPoints * 3 == len(drawn[0].ContourData)


def test_nothing_segmented_is_an_empty_structure(tmp_path: Path) -> None:
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    nothing = np.zeros(series.shape, np.uint8)
    write_dicom_rtstruct(tmp_path / "rt.dcm", nothing, series, make_segments(LABELS))
    data = dcmread(tmp_path / "rt.dcm")
    assert [len(roi.ContourSequence) for roi in data.ROIContourSequence] == [0, 0, 0]


def test_misfits_are_refused(tmp_path: Path, label_map: Any) -> None:
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    path, segments = tmp_path / "rt.dcm", make_segments(LABELS)
    with pytest.raises(GeometryError, match=r"shape \(6, 4, 5\), found \(6, 4, 4\)"):
        write_dicom_rtstruct(path, label_map[..., 1:], series, segments)
    with pytest.raises(ConfigError, match=r"labels without a segment.*\[9\]"):
        write_dicom_rtstruct(path, label_map, series, segments[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="can't write an RTSTRUCT"):
        write_dicom_rtstruct(tmp_path / "file" / "r.dcm", label_map, series, segments)
    assert not path.exists()


def test_headers_that_lack_too_much_are_named(tmp_path: Path, label_map: Any) -> None:
    group = make.datasets()
    for data in group:
        del data.FrameOfReferenceUID
    series = list_series(make.write(tmp_path / "scan", group))[0]
    with pytest.raises(FormatError, match=r"can't make an RTSTRUCT.*series 3"):
        write_dicom_rtstruct(
            tmp_path / "r.dcm", label_map, series, make_segments(LABELS)
        )
    assert not (tmp_path / "r.dcm").exists()
