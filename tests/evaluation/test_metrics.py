"""Metrics on shapes with known answers, and against medpy and MONAI."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from segmamba.errors import GeometryError
from segmamba.evaluation import metrics

SPACINGS = ((1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (2.5, 0.4, 1.1))


def cube(shape, start, stop):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def ball(shape, centre, radius_mm, spacing):
    grid = np.indices(shape).astype(float)
    away = (grid - np.reshape(centre, (3, 1, 1, 1))) * np.reshape(spacing, (3, 1, 1, 1))
    return (away**2).sum(axis=0) <= radius_mm**2


def random_pair(seed):
    """Two overlapping blobs with specks on an anisotropic grid."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(12, 26, 3))
    spacing = tuple(rng.uniform(0.4, 3.0, 3))
    middle = np.array(shape) / 2
    radius = 0.3 * min(n * mm for n, mm in zip(shape, spacing, strict=True)) + 1
    masks = []
    for _ in range(2):
        mask = ball(shape, middle + rng.normal(0, 1.5, 3), radius, spacing)
        masks.append(mask ^ (rng.random(shape) > 0.995))
    assert all(mask.any() for mask in masks)
    return masks[0], masks[1], spacing


def brute_force(prediction, reference, spacing):
    """Distances by the definition, without any library."""

    def border(mask):
        points = []
        for index in np.argwhere(mask):
            for axis, step in itertools.product(range(3), (-1, 1)):
                near = index.copy()
                near[axis] += step
                inside = (near >= 0).all() and (near < mask.shape).all()
                if not inside or not mask[tuple(near)]:
                    points.append(index * np.array(spacing))
                    break
        return np.array(points)

    a, b = border(prediction), border(reference)
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))
    return table.min(axis=1), table.min(axis=0)


def test_dice_counts_voxels():
    a = cube((10, 10, 10), (0, 0, 0), (4, 4, 4))
    b = cube((10, 10, 10), (2, 0, 0), (6, 4, 4))
    assert metrics.dice(a, b) == pytest.approx(2 * 32 / 128)
    assert metrics.dice(a, a) == 1.0


def test_empty_masks_follow_the_stated_rules():
    empty, full = np.zeros((3, 4, 12), bool), cube((3, 4, 12), (1, 1, 1), (2, 2, 2))
    spacing = (1.0, 1.0, 1.0)
    for both in (metrics.hd95, metrics.hd95_max):
        assert both(empty, empty, spacing) == 0.0
        assert both(full, empty, spacing) == 13.0  # the diagonal of 3, 4, 12
        assert both(empty, full, spacing, penalty_mm=373.13) == 373.13
    assert metrics.dice(empty, empty) == 1.0
    assert metrics.dice(full, empty) == metrics.dice(empty, full) == 0.0
    assert metrics.surface_dice(empty, empty, spacing) == 1.0
    assert metrics.surface_dice(full, empty, spacing) == 0.0
    assert metrics.surface_dice(empty, full, spacing) == 0.0
    assert metrics.surface_distances(empty, full, spacing) is None


def test_different_shapes_are_refused():
    with pytest.raises(GeometryError, match=r"expected \(3, 3, 3\).*found \(3, 3, 4\)"):
        metrics.dice(np.ones((3, 3, 4)), np.ones((3, 3, 3)))
    with pytest.raises(GeometryError):
        metrics.surface_distances(np.ones((3, 3, 4)), np.ones((3, 3, 3)), SPACINGS[0])


def test_volume_is_in_millilitres():
    mask = cube((20, 20, 20), (0, 0, 0), (10, 10, 5))
    assert metrics.volume_ml(mask, (1.0, 2.0, 3.0)) == pytest.approx(3.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_plate_is_as_far_as_it_was_moved(axis):
    """Every border voxel of a one-voxel plate is exactly the shift away."""
    spacing = (0.7, 1.3, 3.0)
    start, stop = [0, 0, 0], [12, 12, 12]
    start[axis], stop[axis] = 2, 3
    plate = cube((12, 12, 12), start, stop)
    moved = np.roll(plate, 4, axis)
    assert metrics.hd95(moved, plate, spacing) == pytest.approx(4 * spacing[axis])
    assert metrics.hd95_max(moved, plate, spacing) == pytest.approx(4 * spacing[axis])
    just_less, just_more = 4 * spacing[axis] - 1e-6, 4 * spacing[axis] + 1e-6
    assert metrics.surface_dice(moved, plate, spacing, tolerance_mm=just_less) == 0
    assert metrics.surface_dice(moved, plate, spacing, tolerance_mm=just_more) == 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_concentric_balls_differ_by_their_radii(spacing):
    shape = tuple(int(np.ceil(40 / mm)) | 1 for mm in spacing)
    centre = [n // 2 for n in shape]
    small, large = (ball(shape, centre, r, spacing) for r in (9.0, 14.0))
    voxel = max(spacing)
    assert metrics.hd95(small, large, spacing) == pytest.approx(5.0, abs=voxel)
    assert metrics.hd95_max(small, large, spacing) == pytest.approx(5.0, abs=voxel)


def test_pooled_and_directed_percentiles_differ_as_defined():
    """A far speck of the prediction weighs on one direction only."""
    reference = cube((40, 12, 12), (2, 2, 2), (10, 10, 10))
    prediction = reference.copy()
    prediction[30, 2:7, 2:6] = True  # 20 of 316 there, but of 612 in both
    to_reference, to_prediction = brute_force(prediction, reference, (1, 1, 1))
    assert to_prediction.max() == 0
    pooled = np.percentile(np.concatenate([to_reference, to_prediction]), 95)
    assert metrics.hd95(prediction, reference, (1, 1, 1)) == pytest.approx(pooled)
    directed = np.percentile(to_reference, 95)
    assert metrics.hd95_max(prediction, reference, (1, 1, 1)) == pytest.approx(directed)
    assert pooled == 0 < directed


@pytest.mark.parametrize("seed", range(4))
def test_distances_agree_with_brute_force(seed):
    prediction, reference, spacing = random_pair(seed)
    ours = metrics.surface_distances(prediction, reference, spacing)
    to_reference, to_prediction = brute_force(prediction, reference, spacing)
    assert ours is not None
    np.testing.assert_allclose(ours.to_reference, to_reference, atol=1e-9)
    np.testing.assert_allclose(ours.to_prediction, to_prediction, atol=1e-9)
    near = sum((way <= 1.5).sum() for way in (to_reference, to_prediction))
    share = near / (to_reference.size + to_prediction.size)
    ours_share = metrics.surface_dice(prediction, reference, spacing, tolerance_mm=1.5)
    assert ours_share == pytest.approx(share)


def test_masks_touching_the_edge_have_a_border_there():
    whole = np.ones((5, 5, 5), bool)
    ours = metrics.surface_distances(whole, whole, (1, 1, 1))
    assert ours is not None
    assert ours.to_reference.size == 125 - 27


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(10))
def test_hd95_is_medpys(seed):
    binary = pytest.importorskip("medpy.metric.binary")
    prediction, reference, spacing = random_pair(seed)
    ours = metrics.hd95(prediction, reference, spacing)
    assert ours == pytest.approx(binary.hd95(prediction, reference, spacing), abs=1e-5)
    assert metrics.dice(prediction, reference) == pytest.approx(
        binary.dc(prediction, reference)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
def test_directed_hd95_surface_dice_and_dice_are_monais(seed):
    monai = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    prediction, reference, spacing = random_pair(seed)
    pair = [torch.from_numpy(mask[None, None]) for mask in (prediction, reference)]
    theirs = monai.compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=spacing
    )
    ours = metrics.hd95_max(prediction, reference, spacing)
    assert ours == pytest.approx(float(theirs), abs=1e-4)
    theirs = monai.compute_surface_dice(
        *pair, class_thresholds=[1.5], include_background=True, spacing=spacing
    )
    ours = metrics.surface_dice(prediction, reference, spacing, tolerance_mm=1.5)
    assert ours == pytest.approx(float(theirs), abs=1e-6)
    theirs = monai.compute_dice(*pair, include_background=True)
    assert metrics.dice(prediction, reference) == pytest.approx(float(theirs), abs=1e-6)
