"""Fingerprints of hand-made and of real data sets."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmamba.atomic import read_json, write_json
from segmamba.config import from_dict
from segmamba.data.dataset import Case, Dataset
from segmamba.data.fingerprint import (
    Fingerprint,
    canonical,
    guess_modality,
    make_fingerprint,
)
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, FormatError, GeometryError

SCHEME = LabelScheme({"background": 0, "organ": 1, "tumour": 2}, ignore_label=9)


def write_case(folder: Path, name: str, image, label, affine) -> Case:
    paths = folder / f"{name}.nii.gz", folder / f"{name}_seg.nii.gz"
    nib.save(nib.Nifti1Image(image, affine), paths[0])
    nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), paths[1])
    return Case(name, (paths[0],), paths[1])


def dataset_of(folder: Path, cases, channels=("T1",), scheme=SCHEME) -> Dataset:
    return Dataset("toy", folder, "csv", channels, scheme, tuple(cases))


@pytest.fixture
def toy(tmp_path) -> Dataset:
    """Two cases in different orientations with known foreground values."""
    first = np.zeros((10, 12, 8), np.float32)
    first[2:9, 1:11, 3:8] = 5
    label = np.zeros(first.shape)
    label[3:6, 4:6, 4:6] = 1
    label[6, 6, 6] = 2
    label[8, 10, 7] = 9
    first[label == 1], first[label == 2], first[label == 9] = 100, 100, -4000
    affine = np.diag([-1.0, -1.0, 3.0, 1])
    cases = [write_case(tmp_path, "one", first, label, affine)]
    # The second: the same axes transposed to (S, R, A), all 50 in the foreground.
    second = np.full((6, 10, 14), 7, np.float32)
    label = np.zeros(second.shape)
    label[2:4, 3:5, 3:6] = 1
    second[label == 1] = 50
    turned = np.zeros((4, 4))
    turned[2, 0], turned[0, 1], turned[1, 2], turned[3, 3] = 5.0, 2.0, 1.0, 1
    cases.append(write_case(tmp_path, "two", second, label, turned))
    return dataset_of(tmp_path, cases)


def test_a_hand_made_data_set(toy):
    seen = []
    fingerprint = make_fingerprint(toy, progress=lambda *news: seen.append(news))
    one, two = fingerprint.cases
    assert (one.shape, one.cropped_shape) == ((10, 12, 8), (7, 10, 5))
    assert (one.orientation, two.orientation) == ("LPS", "SRA")
    assert one.spacing_mm == pytest.approx((1, 1, 3))
    assert two.cropped_shape == two.shape == (6, 10, 14)
    assert one.label_voxels == {"organ": 12, "tumour": 1}
    assert fingerprint.label_voxels == {"organ": 24, "tumour": 1}
    # Patient axes: (1, 1, 3) and (2, 1, 5); crops (7, 10, 5) and (10, 14, 6).
    assert fingerprint.median_spacing_mm == pytest.approx((1.5, 1, 4))
    assert fingerprint.median_shape == (8, 12, 6)
    (channel,) = fingerprint.channels
    # Both cases count alike; the ignored voxel at -4000 doesn't.
    assert channel.mean == pytest.approx(75)
    assert channel.std == pytest.approx(25)
    assert (channel.min, channel.max) == (50, 100)
    assert (channel.percentile_00_5, channel.percentile_99_5) == (50, 100)
    zero = 1 - 7 * 10 * 5 / (10 * 12 * 8)
    assert channel.zero_share == pytest.approx(zero / 2, abs=1e-6)
    assert {news[2] for news in seen} == {"one", "two"}
    assert [news[:2] for news in seen] == [(1, 2), (2, 2)]


def test_it_goes_through_json_and_does_not_depend_on_threads(toy, tmp_path):
    fingerprint = make_fingerprint(toy, workers=1)
    assert make_fingerprint(toy, workers=3) == fingerprint
    write_json(tmp_path / "fingerprint.json", fingerprint.to_dict())
    data = read_json(tmp_path / "fingerprint.json")
    assert from_dict(Fingerprint, data) == fingerprint
    data["case"] = data.pop("cases")
    with pytest.raises(ConfigError, match=r"'cases'"):
        from_dict(Fingerprint, data)


def test_percentiles_against_all_voxels(tmp_path):
    rng = np.random.default_rng(5)
    cases, values = [], []
    for index in range(3):
        image = rng.gamma(2.0, 100.0, (30, 30, 30)).astype(np.float32)
        label = rng.random((30, 30, 30)) < 0.4
        values.append(image[label])
        cases.append(write_case(tmp_path, f"c{index}", image, label, np.eye(4)))
    (channel,) = make_fingerprint(dataset_of(tmp_path, cases)).channels
    every = np.concatenate(values)
    low, high = np.percentile(every, (0.5, 99.5))
    assert channel.percentile_00_5 == pytest.approx(low, rel=0.1)
    assert channel.percentile_99_5 == pytest.approx(high, rel=0.03)
    assert channel.mean == pytest.approx(every.mean(), rel=0.01)
    assert channel.std == pytest.approx(every.std(), rel=0.02)


def test_without_foreground_the_image_itself_counts(tmp_path):
    image = np.zeros((6, 6, 6), np.float32)
    image[2:4] = 8
    case = write_case(tmp_path, "c", image, np.zeros(image.shape), np.eye(4))
    (channel,) = make_fingerprint(dataset_of(tmp_path, [case])).channels
    assert (channel.mean, channel.std) == (8, 0)


@pytest.mark.parametrize(
    ("name", "lowest", "expected"),
    [
        ("CT", [0.0], "ct"),
        ("ct_portal", [0.0], "ct"),
        ("Computed Tomography", [0.0], "ct"),
        ("T1", [-1024.0], "other"),
        ("FLAIR", [-2000.0], "other"),
        ("MRI", [-1000.0] * 9, "other"),
        ("PET", [-1000.0], "other"),
        ("ACT", [-1000.0], "other"),
        ("0", [-1024.0] * 10, "ct"),
        ("image", [-1024.0] * 9 + [0.0], "ct"),
        ("image", [-1024.0] * 5 + [0.0] * 5, "other"),
        ("channel_0", [0.0], "other"),
        ("noNorm", [-1024.0], "none"),
    ],
)
def test_modalities(name, lowest, expected):
    assert guess_modality(name, lowest) == expected


def test_canonical_order():
    assert canonical((1, 2, 3), "SPL") == (3, 2, 1)
    assert canonical((1, 2, 3), "RAS") == (1, 2, 3)


def test_problems_name_case_and_file(toy, tmp_path):
    whole = np.ones((5, 5, 5), np.float32)
    broken = whole.copy()
    broken[1, 1, 1] = np.inf
    bad = write_case(tmp_path, "bad", broken, whole, np.eye(4))
    with pytest.raises(FormatError, match=r"case bad: .*infinite.*bad\.nii\.gz"):
        make_fingerprint(dataset_of(tmp_path, [*toy.cases, bad]))
    other = write_case(tmp_path, "other", whole, np.ones((5, 5, 4)), np.eye(4))
    with pytest.raises(GeometryError, match=r"case other: .*other_seg\.nii\.gz"):
        make_fingerprint(dataset_of(tmp_path, [other]))
    with pytest.raises(FormatError, match=r"case one: .*expected 2, found 1"):
        make_fingerprint(dataset_of(tmp_path, toy.cases, ("T1", "T2")))
    (tmp_path / "cut.nii.gz").write_bytes(other.images[0].read_bytes()[:60])
    cut = Case("cut", (tmp_path / "cut.nii.gz",), other.label)
    with pytest.raises(FormatError, match=r"case cut: .*cut\.nii\.gz"):
        make_fingerprint(dataset_of(tmp_path, [cut]))
    with pytest.raises(FormatError, match=r"no labelled case"):
        make_fingerprint(dataset_of(tmp_path, []))


def test_the_real_hippocampus(shared_data):
    folder = shared_data / "Task04_Hippocampus"
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))
    cases = [Case(f.name[:-7], (f,), folder / "labelsTr" / f.name) for f in images]
    scheme = LabelScheme({"background": 0, "Anterior": 1, "Posterior": 2})
    fingerprint = make_fingerprint(dataset_of(folder, cases, ("MRI",), scheme))
    assert len(fingerprint.cases) == 208
    assert fingerprint.median_shape == (35, 50, 36)  # the data's README
    assert fingerprint.median_spacing_mm == (1, 1, 1)
    assert fingerprint.channels[0].modality == "other"
    voxels = sum(
        int((nib.load(case.label).get_fdata() == 1).sum()) for case in cases[:20]
    )
    counted = sum(case.label_voxels["Anterior"] for case in fingerprint.cases[:20])
    assert counted == voxels
