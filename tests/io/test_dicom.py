from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dicom_series as make
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.uid import generate_uid

from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    FormatError,
    GeometryError,
)
from segmamba.io import choose_series, list_series, read_dicom, read_volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def oracle(folder: Path) -> tuple[Any, Any]:
    """Voxels (I, J, K) and affine, as ITK's series reader gives them."""
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


def test_a_series_is_read_as_itk_reads_it(tmp_path: Path) -> None:
    make.write(tmp_path, make.datasets(RescaleSlope=2.5, RescaleIntercept=-1024))
    volume = read_dicom(tmp_path)
    array, affine = oracle(tmp_path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_array_equal(
        volume.array[0], make.voxels().T * np.float32(2.5) - 1024
    )
    np.testing.assert_allclose(volume.affine, affine, atol=1e-9)
    assert volume.spacing_mm == pytest.approx((0.75, 1.5, 2.5))


def test_a_slope_of_zero_is_none_as_in_itk(tmp_path: Path) -> None:
    make.write(tmp_path, make.datasets(RescaleSlope=0, RescaleIntercept=-7))
    volume = read_dicom(tmp_path)
    np.testing.assert_array_equal(volume.array[0], oracle(tmp_path)[0])
    np.testing.assert_array_equal(volume.array[0], make.voxels().T - 7)


def test_slices_against_the_normal_come_out_the_same(tmp_path: Path) -> None:
    make.write(tmp_path / "a", make.datasets())
    make.write(tmp_path / "b", make.datasets()[::-1])
    first, second = read_dicom(tmp_path / "a"), read_dicom(tmp_path / "b")
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_array_equal(first.affine, second.affine)


@pytest.mark.parametrize("name", ["11_HCropVolume"])
def test_a_real_series_is_read_as_itk_reads_it(shared_data: Path, name: str) -> None:
    folder = shared_data / "dicom_study1" / name
    volume, (array, affine) = read_dicom(folder), oracle(folder)
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-9)


def test_a_real_study_is_four_channels(shared_data: Path) -> None:
    source = shared_data / "dicom_study1" / "full_study.tar.xz"
    volume = read_dicom(source, ["T1pre", "11", "T2_reg", "36468"])
    assert volume.array.shape == (4, 280, 320, 22)
    assert volume.spacing_mm == pytest.approx((0.6875, 0.6875, 6.5))
    down = np.degrees(np.arccos(abs(volume.affine[2, 2]) / 6.5))
    assert down == pytest.approx(10.8, abs=0.01)
    with pytest.raises(GeometryError, match=r"different grids.*shape"):
        read_dicom(source, ["T2_reg", "HippoCrop"])


def test_a_multi_frame_file_is_sorted_and_scaled_frame_by_frame(tmp_path: Path) -> None:
    stored, order = make.voxels(), [3, 0, 4, 2, 1]
    path = tmp_path / "enhanced.dcm"
    make.multi_frame(stored, order).save_as(path, enforce_file_format=True)
    volume = read_dicom(path)
    expected = stored.T * np.float32(2) + np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(volume.array[0], expected)
    make.write(tmp_path / "slices", make.datasets(stored))
    np.testing.assert_allclose(
        volume.affine, read_dicom(tmp_path / "slices").affine, atol=1e-9
    )


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two series on one grid, one beside them, and a report."""
    make.write(tmp_path, make.datasets(description="T1 ax", number=3), "a")
    other = make.datasets(make.voxels(1), description="T2 ax", number=13)
    make.write(tmp_path / "deep", other)
    moved = make.datasets(description="DWI", number=14)
    for data in moved:
        make.place(data, np.add(data.ImagePositionPatient, [0, 0, 1]))
    make.write(tmp_path / "moved", moved)
    report = make.datasets()[0]
    report.Modality = "SR"
    del report.Rows, report.PixelData
    report.SeriesInstanceUID = generate_uid()
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    (tmp_path / "notes.txt").write_text("no DICOM")
    return tmp_path


def test_series_are_listed_and_chosen(study: Path) -> None:
    found = list_series(study)
    assert [(s.number, s.description) for s in found] == [
        (3, "T1 ax"),
        (13, "T2 ax"),
        (14, "DWI"),
    ]
    for choice in ("13", "t2 AX", "t2", found[1].uid, found[1].uid[-8:]):
        assert choose_series(found, choice) is found[1]
    volume = read_dicom(study, ["13", "3"], dtype=np.int16)
    np.testing.assert_array_equal(volume.array[0], make.voxels(1).T)
    np.testing.assert_array_equal(volume.array[1], make.voxels(0).T)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (None, "several series.*3: T1 ax.*13: T2 ax.*--series"),
        ("4", "no series fits '4'.*T1 ax"),
        ("1", "no series fits '1'"),  # a number is no part of "T1"
        ("ax", "'ax' fits several series"),
    ],
)
def test_what_is_not_clear_is_asked(study: Path, choice: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_dicom(study, choice)


def test_series_on_other_grids_are_no_channels(study: Path) -> None:
    with pytest.raises(GeometryError, match=r"different grids.*1 mm .* series 14"):
        read_dicom(study, ["3", "14"])


def test_channels_of_two_patients_or_frames_are_refused(tmp_path: Path) -> None:
    make.write(tmp_path / "a", make.datasets(number=1))
    make.write(tmp_path / "b", make.datasets(number=2, PatientID="2"))
    make.write(
        tmp_path / "c", make.datasets(number=3, FrameOfReferenceUID=generate_uid())
    )
    with pytest.raises(FormatError, match="different patients"):
        read_dicom(tmp_path, ["1", "2"])
    with pytest.raises(GeometryError, match="another frame of reference"):
        read_dicom(tmp_path, ["1", "3"])


def lack(group: list[Any]) -> list[Any]:
    return [*group[:2], *group[3:]]


def twice(group: list[Any]) -> list[Any]:
    make.place(group[3], np.array(group[2].ImagePositionPatient))
    return group


def tilted(group: list[Any]) -> list[Any]:
    for k, data in enumerate(group):
        make.place(data, make.ORIGIN + k * (2.5 * make.NORMAL + [0, 0.5, 0]))
    return group


def shifted(group: list[Any]) -> list[Any]:
    make.place(group[2], np.array(group[2].ImagePositionPatient) + 2 * make.ROW)
    return group


def uneven(group: list[Any]) -> list[Any]:
    make.place(group[2], np.array(group[2].ImagePositionPatient) + 0.6 * make.NORMAL)
    return group


def mixed(group: list[Any]) -> list[Any]:
    group[1].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    return group


def turned(group: list[Any]) -> list[Any]:
    group[1].ImageOrientationPatient = [1, 0, 0, 0, 0.98, 0.198997]
    return group


def resized(group: list[Any]) -> list[Any]:
    group[4].Rows, group[4].Columns = 3, 8
    return group


def stretched(group: list[Any]) -> list[Any]:
    group[4].PixelSpacing = [1.5, 0.8]
    return group


def flat(group: list[Any]) -> list[Any]:
    for data in group:
        data.PixelSpacing = [1.5, -0.75]
    return group


def unplaced(group: list[Any]) -> list[Any]:
    del group[0].ImagePositionPatient
    return group


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lack, r"lacks slices: expected a slice every 2.5 mm, found 1 gap of about 1"),
        (twice, r"several slices at one place.*1 too many, such as \d+_\d.dcm and"),
        (tilted, r"a tilted gantry.*a tilt of 11\.54 degrees"),
        (shifted, r"slices that are shifted.*2 mm sideways"),
        (uneven, r"uneven steps.*expected 2.5 mm, found 1.9 to 3.1 mm"),
        (mixed, r"different orientation.*in 4 files.*in 1 files.*localizer"),
        (turned, r"different orientation.*cosines that differ"),
        (resized, r"different size \(rows, columns\).*\(4, 6\) in 4 files"),
        (stretched, r"different pixel spacing.*0.8"),
        (flat, r"unusable pixel spacing.*above 0, found 1\.5 and -0\.75"),
        (unplaced, r"doesn't say where.*ImagePositionPatient.*1 of 5 without"),
    ],
)
def test_spoiled_series_are_named(tmp_path: Path, spoil: Any, text: str) -> None:
    make.write(tmp_path, spoil(make.datasets()))
    with pytest.raises(GeometryError, match=text) as caught:
        read_dicom(tmp_path)
    assert "series 3 (T1 ax)" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("kept", "tags", "sign"),
    [
        (slice(1, 5), {}, "instance numbers 2 to 5, not from 1"),
        (slice(0, 4), {"ImagesInAcquisition": 5}, "4 of 5 that were acquired"),
        (slice(0, 5), {"ImagesInAcquisition": 5}, None),
        (slice(0, 4), {}, None),  # nothing tells
    ],
)
def test_signs_of_missing_ends_are_warned_of(
    tmp_path: Path, caplog: Any, kept: slice, tags: dict[str, int], sign: str | None
) -> None:
    make.write(tmp_path, make.datasets(**tags)[kept])
    assert read_dicom(tmp_path).shape[2] == kept.stop - kept.start
    expected = [f"series 3 (T1 ax) may lack slices at an end: {sign}"] if sign else []
    assert caplog.messages == expected


def test_rounded_positions_are_no_fault(tmp_path: Path) -> None:
    group = make.datasets()
    for data in group:
        make.place(data, np.round(np.array(data.ImagePositionPatient), 3))
    make.write(tmp_path, group)
    assert read_dicom(tmp_path).spacing_mm == pytest.approx((0.75, 1.5, 2.5), abs=1e-3)


def test_one_file_of_a_series_is_no_scan(tmp_path: Path) -> None:
    make.write(tmp_path, make.datasets())
    path = next(tmp_path.iterdir())
    with pytest.raises(FormatError, match=r"one slice is not a scan.*folder"):
        read_dicom(path)
    with pytest.raises(FormatError, match=r"a DICOM file.*segmamba predict"):
        read_volume(path)


def test_screenshots_spoil_no_study(tmp_path: Path) -> None:
    make.write(tmp_path, make.datasets(number=1))
    shot = make.datasets(number=2, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    make.write(tmp_path / "shot", shot)
    assert read_dicom(tmp_path, "1").shape == (6, 4, 5)
    with pytest.raises(FormatError, match="RGB, 3 numbers a voxel"):
        read_dicom(tmp_path, "2")


def test_truncated_and_empty_are_refused(tmp_path: Path) -> None:
    make.write(tmp_path / "cut", make.datasets())
    path = next((tmp_path / "cut").iterdir())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match=f"can't read a DICOM file.*{path.name}"):
        read_dicom(tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no DICOM series found"):
        read_dicom(tmp_path / "empty")
    with pytest.raises(FormatError, match="no such file or folder"):
        read_dicom(tmp_path / "nowhere")


def test_claims_beyond_the_file_are_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    make.write(tmp_path, make.datasets(Rows=65535, Columns=65535))
    with pytest.raises(FormatError, match="too small for its voxels"):
        read_dicom(tmp_path)


def test_damaged_headers_are_errors_of_ours(tmp_path: Path) -> None:
    data = make.write(tmp_path / "good", make.datasets())
    whole = next(data.iterdir()).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "bad" / "x.dcm"
    path.parent.mkdir()
    refused = 0
    for _ in range(200):
        broken = bytearray(whole)
        for place in random.integers(132, len(whole), 8):
            broken[place] = random.integers(256)
        path.write_bytes(bytes(broken[: random.integers(132, len(whole) + 1)]))
        try:
            read_dicom(path.parent)
        except (FormatError, GeometryError, BackendUnavailableError):
            refused += 1
    assert refused > 50


def test_without_pydicom_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.write(tmp_path, make.datasets())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'segmamba\[dicom"):
        read_dicom(tmp_path)
