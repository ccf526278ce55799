"""The simulated BraTS: layout, anatomy, tumours, and that it repeats."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from scipy import ndimage

from segmamba.data.layouts import load_dataset
from segmamba.demo import make_demo_dataset
from segmamba.demo.fields import fill_holes, smooth_field
from segmamba.demo.simulate import simulate_case
from segmamba.errors import BackendUnavailableError, ConfigError
from segmamba.io import read_case, read_volume

needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="needs nilearn's package data"
)


@pytest.fixture(scope="module")
def cases():
    """Five cases at 3 mm, where all of it takes about a second."""
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("needs nilearn's package data")
    return [simulate_case(index, spacing_mm=3.0) for index in range(5)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("needs nilearn's package data")
    seen = []
    folder = make_demo_dataset(
        tmp_path_factory.mktemp("demo"),
        cases=3,
        spacing_mm=3.0,
        progress=lambda *row: seen.append(row),
    )
    assert [row[:2] for row in seen] == [(1, 3), (2, 3), (3, 3)]
    return load_dataset(folder)


def test_layout_is_brats_2023(dataset):
    assert dataset.layout == "brats"
    assert dataset.channels == ("t1n", "t1c", "t2w", "t2f")
    assert dataset.cases[2].id == "BraTS-GLI-00002-000"
    assert dataset.cases[0].images[3].name == "BraTS-GLI-00000-000-t2f.nii.gz"
    regions = {name: set(values) for name, values in dataset.labels.regions.items()}
    assert regions == {"WT": {1, 2, 3}, "TC": {1, 3}, "ET": {3}}


def test_files_are_int16_in_brats_geometry(dataset):
    case = dataset.cases[0]
    assert read_volume(case.images[0]).array.dtype == np.int16
    image, label = read_case(case.images), read_volume(case.label)
    assert label.array.dtype == np.uint8
    np.testing.assert_array_equal(np.sign(np.diag(image.affine)), [-1, -1, 1, 1])
    np.testing.assert_allclose(image.affine, label.affine)
    assert image.shape == label.shape == (80, 80, 52)
    assert image.spacing_mm == pytest.approx((3, 3, 3))


def test_the_same_seed_gives_the_same_files(dataset):
    """In memory, in another order and alone, as in the data set."""
    images, label, _ = simulate_case(1, spacing_mm=3.0)
    case = dataset.cases[1]
    np.testing.assert_array_equal(read_volume(case.label).array[0], label)
    np.testing.assert_array_equal(read_volume(case.images[1]).array[0], images["t1c"])
    other, _, _ = simulate_case(1, seed=1, spacing_mm=3.0)
    assert (other["t1c"] != images["t1c"]).any()


def test_brains_have_the_size_of_brains(cases):
    for images, _, _ in cases:
        brain = images["t1n"] > 0
        assert 1000 < brain.sum() * 27 / 1000 < 2100  # millilitres
        for image in images.values():
            np.testing.assert_array_equal(image > 0, brain)
        assert ndimage.label(brain)[1] == 1


def test_brains_differ(cases):
    masks = [images["t1n"] > 0 for images, _, _ in cases]
    overlap = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
    assert overlap < 0.985


def test_tumours_lie_in_the_brain_in_one_piece_with_all_layers(cases):
    kinds = set()
    for images, label, _ in cases:
        assert set(np.unique(label)) <= {0, 1, 2, 3}
        assert not (label[images["t1n"] == 0]).any()
        assert ndimage.label(label > 0, np.ones((3, 3, 3)))[1] == 1
        assert (label == 2).sum() * 27 > 1500
        assert np.isin(label, (1, 3)).sum() * 27 > 1500
        kinds.update(np.unique(label).tolist())
    assert kinds == {0, 1, 2, 3}


def test_contrasts_are_ordered_as_in_real_scans(cases):
    """Enhancing tumour in T1c, oedema in FLAIR, necrosis in T2 stand out."""
    for images, label, _ in cases:
        healthy = (images["t1n"] > 0) & (label == 0)
        normal = {name: np.median(image[healthy]) for name, image in images.items()}
        oedema = np.median(images["t2f"][label == 2])
        assert oedema > 1.15 * normal["t2f"]
        if (label == 1).sum() > 100:
            assert np.median(images["t2w"][label == 1]) > 1.3 * normal["t2w"]
            assert np.median(images["t1n"][label == 1]) < 0.8 * normal["t1n"]
        if (label == 3).sum() > 100:
            assert np.median(images["t1c"][label == 3]) > 1.2 * normal["t1c"]


def test_look_alikes_forbid_a_single_threshold(cases):
    """A level that keeps three quarters of a tumour also lights up healthy voxels."""
    for images, label, _ in cases:
        healthy = (images["t1n"] > 0) & (label == 0)
        for channel, value in (("t1c", 3), ("t2f", 2)):
            tumour = images[channel][label == value]
            if tumour.size:
                level = np.percentile(tumour, 25)
                assert (images[channel][healthy] > level).sum() > 20


@needs_nilearn
@pytest.mark.parametrize("options", [{"cases": 0}, {"spacing_mm": 0.2}])
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(ConfigError):
        make_demo_dataset(tmp_path, **options)


def test_without_nilearn_the_extra_is_named(tmp_path, monkeypatch):
    from segmamba.demo import template

    template.load_template.cache_clear()
    monkeypatch.setattr(template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"segmamba\[demo\]"):
        make_demo_dataset(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_smooth_fields_have_unit_variance_and_the_stated_length():
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_field(rng, (24, 20, 30), 2.0, 5.0) for _ in range(300)])
    np.testing.assert_allclose(fields.std(axis=0).mean(), 1.0, atol=0.02)
    assert abs(fields.mean()) < 0.02
    # exp(-d^2 / (4 length^2)) is the correlation of white noise spread by a Gaussian
    near = (fields[:, 10, 10, 10] * fields[:, 10, 10, 14]).mean()
    assert near == pytest.approx(np.exp(-(8.0**2) / (4 * 5.0**2)), abs=0.12)


def test_fill_holes_is_scipys():
    mask = np.random.default_rng(0).random((20, 21, 22)) > 0.35
    expected = ndimage.binary_fill_holes(mask)
    assert (expected != mask).any()
    np.testing.assert_array_equal(fill_holes(mask), expected)
