"""Preprocessing and its inverse, on every axis order and on real scans."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch.nn import functional

from segmamba.config import NetworkConfig
from segmamba.data.geometry import Geometry, orient_array
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.data.preprocess import (
    normalize_channel,
    preprocess_image,
    preprocess_label,
    restore_label_map,
)
from segmamba.errors import ConfigError, FormatError, GeometryError
from segmamba.io import read_case, read_volume
from segmamba.io.volume import Volume

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*order)
]
CLASSES = LabelScheme({"background": 0, "a": 1, "b": 2, "c": 7})
BRATS = LabelScheme(
    {"background": 0, "ncr": 1, "ed": 2, "et": 4},
    {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    (2, 1, 4),
)


def make_plan(
    spacing=(1.0, 1.0, 1.0), orientation="SPL", channels=1, **options
) -> Plan:
    rule = ChannelNormalization(options.pop("scheme", "zscore"))
    return Plan(
        orientation=orientation,
        spacing_mm=spacing,
        patch_size=(16, 16, 16),
        batch_size=2,
        normalization=(rule,) * channels,
        network=NetworkConfig(in_channels=channels),
        **options,
    )


def file_axis(codes: str, code: str) -> int:
    """Which axis of an array with these codes runs along a patient axis."""
    pair = next(pair for pair in ("RL", "AP", "SI") if code in pair)
    return next(axis for axis, own in enumerate(codes) if own in pair)


def affine_of(codes: str, spacing, oblique: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, mm) in enumerate(zip(codes, spacing, strict=True)):
        world = "RAS".find(code) if code in "RAS" else "LPI".find(code)
        affine[world, axis] = mm if code in "RAS" else -mm
    if oblique:
        turn = Rotation.from_euler("xyz", (11, -8, 5), degrees=True).as_matrix()
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12, 77)
    return affine


def blobs(shape, values=(1, 2, 7)) -> np.ndarray:
    """A few ellipsoids, thick enough to survive resampling."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    label = np.zeros(shape, np.int16)
    places = [((-0.2, 0.1, 0), 0.7), ((0.3, 0, 0.2), 0.45), ((-0.3, -0.2, -0.2), 0.3)]
    for value, (centre, radius) in zip(values, places, strict=True):
        distance = np.linalg.norm(grid - np.reshape(centre, (3, 1, 1, 1)), axis=0)
        label[distance < radius] = value
    return label


def logits_of(label: np.ndarray, scheme: LabelScheme, dtype=np.float32) -> np.ndarray:
    if scheme.is_region_based:
        planes = [np.isin(label, group) for group in scheme.regions.values()]
    else:
        planes = [label == value for value in scheme.class_values]
    return (np.stack(planes).astype(np.float64) * 16 - 8).astype(dtype)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("scheme", [CLASSES, BRATS], ids=["classes", "regions"])
def test_a_label_map_comes_back_exactly(codes, scheme):
    values = (1, 2, 7) if scheme is CLASSES else (2, 1, 4)
    label = blobs((17, 24, 20), values)
    spacing = (0.9, 1.3, 4.0)
    affine = affine_of(codes, spacing, oblique=True)
    image = np.random.default_rng(0).normal(size=(1, 17, 24, 20)).astype(np.float32)
    image[:, :2], image[:, :, -3:] = 0, 0  # something to crop
    label[:2], label[:, -3:] = 0, 0
    # The plan's spacing is the file's own, in the order of the plan's axes.
    plan = make_plan(tuple(spacing[file_axis(codes, code)] for code in "SPL"))
    data, geometry = preprocess_image(Volume(image, affine), plan)
    target = preprocess_label(label, geometry, scheme)
    assert data.shape[1:] == target.shape == geometry.cropped_shape
    restored = restore_label_map(logits_of(target, scheme), geometry, scheme)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, label)


@given(
    st.sampled_from(ORIENTATIONS),
    st.sampled_from(["SPL", "RAS", "PSL", "LSP"]),
    st.tuples(*[st.floats(0.5, 3.0)] * 3),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_resampled_label_map_comes_back_nearly(codes, target, spacing, oblique):
    shape = tuple(int(36 / mm) + 12 for mm in spacing)
    label = blobs(shape)
    image = np.ones((1, *shape), np.float32)
    plan = make_plan((1.0, 1.2, 0.9), target)
    volume = Volume(image, affine_of(codes, spacing, oblique))
    _, geometry = preprocess_image(volume, plan)
    assert geometry.spacing_mm == pytest.approx(plan.spacing_mm, rel=0.03)
    resampled = preprocess_label(label, geometry, CLASSES)
    restored = restore_label_map(logits_of(resampled, CLASSES), geometry, CLASSES)
    for value in (1, 2, 7):
        assert dice(restored == value, label == value) > 0.95


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_voxels_keep_their_place_in_the_patient(codes):
    # Brightness is the position in mm along one patient axis; D, H, W of "SPL" must
    # grow towards superior, posterior and left, by the plan's spacing.
    shape, spacing = (20, 22, 24), (2.0, 1.0, 1.5)
    affine = affine_of(codes, spacing)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    world = np.einsum("wa,aijk->wijk", affine[:3, :3], index)
    world += affine[:3, 3].reshape(3, 1, 1, 1)
    plan = make_plan(channels=3, scheme="none", crop_to_nonzero=False)
    data, _ = preprocess_image(Volume(world.astype(np.float32), affine), plan)
    inner = data[:, 4:-4, 4:-4, 4:-4]
    for axis, (channel, sign) in enumerate([(2, 1), (1, -1), (0, -1)]):
        steps = np.diff(inner[channel], axis=axis)
        extent = data.shape[1 + axis]
        source = file_axis(codes, "SPL"[axis])
        exact = shape[source] * spacing[source] / extent
        np.testing.assert_allclose(steps, sign * exact, atol=1e-4)


def test_an_image_is_cropped_with_its_label():
    image = np.zeros((2, 10, 11, 12), np.float32)
    image[0, 3:7, 4:9, 5] = 2
    image[1, 3:5, 2:6, 5:8] = -1
    label = np.zeros((10, 11, 12), np.uint8)
    label[5, 5, 5] = 1
    label[0, 0, 0] = 2  # outside the box: gone
    plan = make_plan(channels=2, orientation="RAS")
    data, geometry = preprocess_image(Volume(image, np.eye(4)), plan)
    assert geometry.crop == ((3, 7), (2, 9), (5, 8))
    assert data.shape == (2, 4, 7, 3)
    target = preprocess_label(label, geometry, CLASSES)
    assert np.argwhere(target).tolist() == [[2, 3, 0]]
    whole = make_plan(channels=2, orientation="RAS", crop_to_nonzero=False)
    assert preprocess_image(Volume(image, np.eye(4)), whole)[0].shape[1:] == (
        10,
        11,
        12,
    )


def test_an_empty_image_stays_whole_and_finite():
    plan = make_plan(scheme="zscore-nonzero")
    data, geometry = preprocess_image(Volume(np.zeros((1, 4, 5, 6)), np.eye(4)), plan)
    assert geometry.cropped_shape == (6, 5, 4)
    assert not data.any()


def test_normalizations():
    rng = np.random.default_rng(3)
    image = rng.normal(300, 50, (6, 7, 8)).astype(np.float32)
    image[:3] = 0
    zscore = normalize_channel(image, ChannelNormalization("zscore"))
    np.testing.assert_allclose(zscore, (image - image.mean()) / image.std(), atol=1e-4)
    masked = normalize_channel(image, ChannelNormalization("zscore-nonzero"))
    inside = image[3:].astype(np.float64)
    assert not masked[:3].any()
    np.testing.assert_allclose(
        masked[3:], (inside - inside.mean()) / inside.std(), atol=1e-4
    )
    rule = ChannelNormalization("ct", (-50.0, 310.0), 100.0, 25.0)
    expected = (np.clip(image, -50, 310) - 100) / 25
    np.testing.assert_allclose(normalize_channel(image, rule), expected, atol=1e-5)
    raw = normalize_channel(image.astype(np.int16), ChannelNormalization("none"))
    np.testing.assert_array_equal(raw, image.astype(np.int16))
    assert all(x.dtype == np.float32 for x in (zscore, masked, raw))


def test_normalization_leaves_the_scan_alone():
    image = np.random.default_rng(0).normal(size=(1, 5, 5, 5)).astype(np.float32)
    before = image.copy()
    preprocess_image(Volume(image, np.eye(4)), make_plan(orientation="RAS"))
    np.testing.assert_array_equal(image, before)


def test_a_constant_image_does_not_divide_by_zero():
    image = np.full((1, 4, 4, 4), 1.7e6, np.float32)
    data, _ = preprocess_image(Volume(image, np.eye(4)), make_plan())
    assert np.abs(data).max() < 1


@pytest.mark.parametrize("scheme", [CLASSES, BRATS], ids=["classes", "regions"])
def test_probabilities_against_the_whole_volume_at_once(scheme):
    image = np.zeros((1, 12, 14, 16), np.float32)
    image[:, 2:11, 1:13, 3:15] = 1
    affine = affine_of("PIR", (1.0, 1.5, 2.0))
    plan = make_plan((1.2, 1.2, 1.2), scheme="none")
    _, geometry = preprocess_image(Volume(image, affine), plan)
    logits = torch.randn(scheme.num_outputs, *geometry.shape) * 4
    label, shares = restore_label_map(
        logits.half().numpy(), geometry, scheme, return_probabilities=True
    )
    assert shares.dtype == np.float16
    assert shares.shape == (scheme.num_outputs, 12, 14, 16)
    whole = functional.interpolate(
        logits.half().float()[None],
        size=geometry.cropped_shape,
        mode="trilinear",
        align_corners=False,
    )[0]
    wanted = whole.sigmoid() if scheme.is_region_based else whole.softmax(dim=0)
    inside = geometry.orient(shares)[(slice(None), *geometry.crop_slices)]
    np.testing.assert_allclose(inside, wanted.numpy(), atol=2e-3)
    outside = np.ones((12, 14, 16), bool)
    geometry.orient(outside)[geometry.crop_slices] = False
    assert (label[outside] == 0).all()
    background = 0 if scheme.is_region_based else 1
    assert (shares[0][outside] == background).all()
    assert not shares[1:, outside].any()
    inner_label = geometry.orient(label)[geometry.crop_slices]
    np.testing.assert_array_equal(inner_label, scheme.decode(whole.numpy()))


@pytest.mark.parametrize("scheme", [CLASSES, BRATS], ids=["classes", "regions"])
def test_ties_are_decoded_as_the_scheme_says(scheme):
    """Logits of few values: many voxels where outputs are equal, or exactly 0."""
    _, geometry = preprocess_image(
        Volume(np.ones((1, 9, 10, 11), np.float32), np.eye(4)), make_plan()
    )
    logits = np.random.default_rng(0).integers(-1, 2, (scheme.num_outputs, 11, 10, 9))
    logits = logits.astype(np.float32)
    found = geometry.orient(restore_label_map(logits, geometry, scheme))
    np.testing.assert_array_equal(found, scheme.decode(logits))
    assert found.dtype == scheme.decode(logits).dtype


def test_restoring_takes_read_only_half_precision_and_bfloat16():
    label = blobs((9, 10, 11))
    volume = Volume(np.ones((1, 9, 10, 11), np.float32), affine_of("LPS", (1, 1, 1)))
    _, geometry = preprocess_image(volume, make_plan())
    target = preprocess_label(label, geometry, CLASSES)
    logits = logits_of(target, CLASSES, np.float16)
    logits.flags.writeable = False
    np.testing.assert_array_equal(restore_label_map(logits, geometry, CLASSES), label)
    half = torch.tensor(logits_of(target, CLASSES)).bfloat16()
    np.testing.assert_array_equal(restore_label_map(half, geometry, CLASSES), label)


def test_the_ignore_label_is_kept():
    scheme = LabelScheme({"background": 0, "a": 1}, ignore_label=2)
    label = np.zeros((6, 6, 6), np.uint8)
    label[2:4], label[4:] = 1, 2
    geometry = preprocess_image(
        Volume(np.ones((1, 6, 6, 6), np.float32), np.eye(4)),
        make_plan((0.5, 0.5, 0.5), "RAS"),
    )[1]
    target = preprocess_label(label.astype(np.float32), geometry, scheme)
    assert target.dtype == np.int16
    assert [np.unique(part).tolist() for part in np.split(target, 3)] == [[0], [1], [2]]


def test_bad_input_is_named():
    image = np.ones((1, 4, 5, 6), np.float32)
    volume = Volume(image, np.eye(4), Path("scan.nii.gz"))
    with pytest.raises(ConfigError, match=r"2 channels.*found 1.*scan\.nii\.gz"):
        preprocess_image(volume, make_plan(channels=2))
    broken = image.copy()
    broken[0, 1, 2, 3] = np.nan
    with pytest.raises(FormatError, match=r"NaN.*1 that.*scan\.nii\.gz"):
        preprocess_image(Volume(broken, np.eye(4), Path("scan.nii.gz")), make_plan())
    geometry = preprocess_image(volume, make_plan())[1]
    label = np.zeros((4, 5, 6), np.float32)
    with pytest.raises(GeometryError, match=r"\(4, 5, 6\).*\(4, 5, 5\).*x\.nii"):
        preprocess_label(label[..., 1:], geometry, CLASSES, file=Path("x.nii"))
    label[0, 0, 0] = 1.5
    with pytest.raises(FormatError, match=r"1\.5"):
        preprocess_label(label, geometry, CLASSES)
    with pytest.raises(GeometryError, match="logits"):
        restore_label_map(np.zeros((3, 6, 5, 4)), geometry, CLASSES)
    incomplete = ChannelNormalization("ct", clip=(0.0, 1.0))
    with pytest.raises(ConfigError, match="clip, mean and std"):
        normalize_channel(image[0], incomplete)


def test_a_real_brats_case_comes_back_identical(shared_data):
    folder = shared_data / "BraTS" / "BraTS2021_01479"
    names = ("t1", "t1ce", "t2", "flair")
    volume = read_case([folder / f"{folder.name}_{n}.nii.gz" for n in names])
    label = read_volume(folder / f"{folder.name}_seg.nii.gz").array[0]
    plan = make_plan(channels=4, scheme="zscore-nonzero")
    data, geometry = preprocess_image(volume, plan)
    assert data.flags.c_contiguous
    assert data.shape[1:] == geometry.shape < (155, 240, 240)
    for raw, channel in zip(volume.array, data, strict=True):
        cropped = geometry.orient(raw)[geometry.crop_slices]
        values = channel[cropped != 0].astype(np.float64)
        assert abs(values.mean()) < 1e-3
        assert values.std() == pytest.approx(1, abs=1e-3)
        assert not channel[cropped == 0].any()
    target = preprocess_label(label, geometry, BRATS)
    logits = logits_of(target, BRATS, np.float16)
    np.testing.assert_array_equal(restore_label_map(logits, geometry, BRATS), label)
    # At 2 mm the regions still come back nearly.
    coarse = make_plan((2.0, 2.0, 2.0), channels=4, scheme="zscore-nonzero")
    _, geometry = preprocess_image(volume, coarse)
    target = preprocess_label(label, geometry, BRATS)
    restored = restore_label_map(logits_of(target, BRATS), geometry, BRATS)
    assert dice(restored > 0, label > 0) > 0.95


def test_a_real_hippocampus_at_another_spacing(shared_data):
    folder = shared_data / "Task04_Hippocampus"
    name = "hippocampus_001.nii.gz"
    scheme = LabelScheme({"background": 0, "Anterior": 1, "Posterior": 2})
    volume = read_case([folder / "imagesTr" / name])
    label = read_volume(folder / "labelsTr" / name).array[0]
    _, geometry = preprocess_image(volume, make_plan((0.7, 0.8, 0.6)))
    assert Geometry.from_dict(geometry.to_dict()) == geometry
    target = preprocess_label(label, geometry, scheme)
    restored = restore_label_map(logits_of(target, scheme), geometry, scheme)
    assert restored.shape == label.shape
    for value in (1, 2):
        assert dice(restored == value, label == value) > 0.97


def test_orienting_is_a_view():
    array = np.zeros((1, 2, 3, 4))
    assert orient_array(array, (2, 0, 1), (True, False, True)).base is array
