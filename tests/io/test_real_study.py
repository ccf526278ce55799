"""A real study from the command line: four tilted series in, DICOM out, read back.

Readers are highdicom, and pydicom with matplotlib's polygons: none of our code.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from pydicom import dcmread

from segmamba import cli
from segmamba.inference import find_cases

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
DESCRIPTIONS = ("T1pre_reg", "T1post", "T2_reg", "FLAIR_reg")
VALUES = np.array([0, 1, 2, 4])
"""What segments 0 (none), 1, 2 and 3 are in label maps of BraTS."""
pytestmark = pytest.mark.slow


@pytest.fixture
def archive(shared_data: Path) -> Path:
    return shared_data / "dicom_study1" / "full_study.tar.xz"


@pytest.fixture
def slices(archive: Path) -> dict[str, list[Any]]:
    """Series to its slices in order of their place, as pydicom reads them."""
    found: dict[str, list[Any]] = {}
    with tarfile.open(archive) as files:
        for member in files:
            stream = files.extractfile(member) if member.isreg() else None
            if stream is not None:
                data = dcmread(io.BytesIO(stream.read()))
                found.setdefault(data.SeriesDescription, []).append(data)
    for group in found.values():
        group.sort(key=lambda data: float(data.ImagePositionPatient[2]))
    return found


def predict(run: Path, study: Path, out: Path, *more: str) -> int:
    words = ["predict", str(run), str(study), "-o", str(out), "--device", "cpu"]
    return cli.main([*words, "--no-mirror", "--overlap", "0", *more])


def test_four_tilted_series_become_segments_and_contours(
    brats_run: Path, archive: Path, slices: dict[str, list[Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert predict(brats_run, archive, out, "--dicom-seg", "--rtstruct") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    series = [row["series"] for row in manifest["cases"]["full_study"]["inputs"]]
    assert [item["description"] for item in series] == list(DESCRIPTIONS)
    assert {item["uid"] for item in series} == {
        slices[name][0].SeriesInstanceUID for name in DESCRIPTIONS
    }
    image = nib.load(out / "full_study.nii.gz")
    label_map = np.asarray(image.dataobj)
    assert label_map.shape == (280, 320, 22)
    assert set(np.unique(label_map)) == set(VALUES)
    first = slices["T1pre_reg"]
    np.testing.assert_allclose(
        image.affine[:3, 3] * (-1, -1, 1), first[0].ImagePositionPatient, atol=1e-3
    )
    segments = by_highdicom(out / "full_study.dcm", first)
    np.testing.assert_array_equal(segments, label_map)
    drawn = by_polygons(out / "full_study_rtstruct.dcm", image)
    np.testing.assert_array_equal(drawn, label_map)


def by_highdicom(path: Path, group: list[Any]) -> np.ndarray:
    """Read the frames that refer to each slice."""
    frames = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [data.SOPInstanceUID for data in group],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    return VALUES[frames].T


def by_polygons(path: Path, image: Any) -> np.ndarray:
    """Ask matplotlib which centres lie in each contour."""
    inverse = np.linalg.inv(image.affine)
    label_map = np.zeros(image.shape, np.uint8)
    for roi in dcmread(path).ROIContourSequence:
        for item in roi.ContourSequence:
            places = np.reshape(item.ContourData, (-1, 3)).astype(float) * (-1, -1, 1)
            index = places @ inverse[:3, :3].T + inverse[:3, 3]
            k = round(float(index[0, 2]))
            np.testing.assert_allclose(index[:, 2], k, atol=1e-3)
            ring = index[[*range(len(index)), 0], :2]
            low, high = np.ceil(ring.min(axis=0)), np.floor(ring.max(axis=0))
            grid = np.mgrid[tuple(map(slice, low, high + 1))].reshape(2, -1).T
            centres = grid + np.array([1.3e-3, 0.7e-3])  # off the holes' cuts
            inside = Polygon(ring, closed=True).contains_points(centres)
            i, j = grid[inside].astype(int).T
            label_map[i, j, k] = VALUES[roi.ReferencedROINumber]
    return label_map


def test_channels_are_chosen_by_number_description_or_uid(
    archive: Path, slices: dict[str, list[Any]]
) -> None:
    uids = [slices[name][0].SeriesInstanceUID for name in DESCRIPTIONS]
    numbers = [str(slices[name][0].SeriesNumber) for name in DESCRIPTIONS]
    parts = ["t1PRE", "Post", "T2_reg", "FLAIR"]
    for choices in (None, numbers, list(DESCRIPTIONS), parts, uids):
        (case,) = find_cases(archive, CHANNELS, series=choices)
        assert [series.uid for series in case.series] == uids
    (case,) = find_cases(archive, CHANNELS, series=[*uids[2:], *uids[:2]])
    assert [series.uid for series in case.series] == [*uids[2:], *uids[:2]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["T1", "T1post", "T2", "FLAIR"], "'T1' fits several series"),
        (["1", "T1post", "T2", "FLAIR"], "no series fits '1'"),
        (["HippoCrop", "T1post", "T2", "FLAIR"], "different grids"),
        (["T1pre", "T1post", "T2"], "expected 4 (t1n, t1c, t2w, t2f, in this order)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    brats_run: Path, archive: Path, tmp_path: Path, capsys: Any, words: Any, says: str
) -> None:
    assert predict(brats_run, archive, tmp_path / "out", "--series", *words) == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
