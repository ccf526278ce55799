"""Lesion-wise scores of hand-made lesions, and of a plain loop over noisy ones."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import ndimage

from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, GeometryError
from segmamba.evaluation import (
    LESION_RULES,
    LesionRule,
    evaluate_case,
    evaluate_folder,
    hd95_max,
    lesion_scores,
)
from segmamba.io import write_label_map

ONE_MM = (1.0, 1.0, 1.0)
EVERY = LesionRule(smallest_mm3=0.0)


def volume(*cubes: tuple[int, int, int], side: int = 4, shape=(40, 40, 40)):
    """Cubes of `side` voxels that begin at the given corners."""
    mask = np.zeros(shape, bool)
    for i, j, k in cubes:
        mask[i : i + side, j : j + side, k : k + side] = True
    return mask


def counts(row):
    names = ("found", "missed", "false", "ignored")
    return tuple(row[f"lesions_{name}"] for name in names)


def test_an_exact_prediction_is_perfect():
    mask = volume((2, 2, 2), (20, 20, 20))
    row = lesion_scores(mask, mask, ONE_MM)
    assert (row["lesion_dice"], row["lesion_hd95_mm"]) == (1.0, 0.0)
    assert counts(row) == (2, 0, 0, 0)


def test_nothing_and_nothing_is_perfect():
    empty = volume()
    row = lesion_scores(empty, empty, ONE_MM)
    assert (row["lesion_dice"], row["lesion_hd95_mm"]) == (1.0, 0.0)
    assert counts(row) == (0, 0, 0, 0)


def test_found_missed_and_false_lesions_are_averaged():
    """Three lesions, one found with half its voxels, and two that are not there."""
    reference = volume((2, 2, 2), (20, 20, 20), (2, 30, 2))
    prediction = volume((2, 2, 4), (2, 30, 30), (30, 2, 2))
    row = lesion_scores(prediction, reference, ONE_MM)
    assert counts(row) == (1, 2, 2, 0)
    assert row["lesion_dice"] == pytest.approx(0.5 / 5)
    assert row["lesion_hd95_mm"] == pytest.approx((2.0 + 4 * 374) / 5)


def test_a_missed_small_lesion_costs_as_much_as_a_missed_large_one():
    """What the volume-wise Dice hides: 1 of 2 lesions missed is a Dice of a half."""
    reference = volume((2, 2, 2), side=20) | volume((30, 30, 30))
    row = lesion_scores(volume((2, 2, 2), side=20), reference, ONE_MM)
    assert row["lesion_dice"] == 0.5
    assert row["lesion_hd95_mm"] == 187.0


def test_small_reference_lesions_are_ignored_found_or_not():
    """3 x 4 x 4 = 48 mm3 is small, 50 voxels of 1 mm3 are too, 51 are not."""
    large, small = volume((20, 20, 20)), volume((2, 2, 2), side=3)
    assert counts(lesion_scores(large, large | small, ONE_MM)) == (1, 0, 0, 1)
    both = lesion_scores(large | small, large | small, ONE_MM)
    assert counts(both) == (1, 0, 0, 1)
    assert both["lesion_dice"] == 1.0
    line = np.zeros((60, 3, 3), bool)
    line[:50, 1, 1] = True
    assert counts(lesion_scores(~line & False, line, ONE_MM)) == (0, 0, 0, 1)
    line[50, 1, 1] = True
    assert counts(lesion_scores(~line & False, line, ONE_MM)) == (0, 1, 0, 0)


def test_the_smallest_volume_is_in_mm():
    mask = volume((2, 2, 2), side=3)
    assert counts(lesion_scores(mask, mask, (1.0, 1.0, 1.0))) == (0, 0, 0, 1)
    assert counts(lesion_scores(mask, mask, (1.0, 1.0, 2.0))) == (1, 0, 0, 0)


def test_false_components_count_however_small():
    reference = volume((20, 20, 20))
    speck = volume((2, 2, 2), side=1)
    row = lesion_scores(reference | speck, reference, ONE_MM)
    assert counts(row) == (1, 0, 1, 0)
    assert row["lesion_dice"] == 0.5
    assert row["lesion_hd95_mm"] == 187.0


@pytest.mark.parametrize(
    ("gap", "steps", "lesions"), [(6, 3, 1), (7, 3, 2), (2, 1, 1), (3, 1, 2)]
)
def test_lesions_whose_surroundings_touch_are_one(gap, steps, lesions):
    """Two grow by `steps` each, so that up to twice as many voxels lie between."""
    reference = volume((2, 2, 2), (2, 2, 2 + 4 + gap))
    rule = LesionRule(dilation_voxels=steps)
    row = lesion_scores(volume((2, 2, 2)), reference, ONE_MM, rule)
    assert row["lesions_found"] + row["lesions_missed"] == lesions
    # One lesion of which half is found: 2 x 64 / (64 + 128); two: 1 and 0.
    assert row["lesion_dice"] == pytest.approx(2 / 3 if lesions == 1 else 0.5)


def test_surroundings_grow_over_edges_but_not_over_corners():
    """One step reaches the 18 neighbours that share a face or an edge."""
    reference = np.zeros((9, 9, 9), bool)
    reference[4, 4, 4] = True
    rule = LesionRule(dilation_voxels=1, smallest_mm3=0.0)
    for place, found in (((3, 3, 4), 1), ((3, 3, 3), 0)):
        prediction = np.zeros_like(reference)
        prediction[place] = True
        row = lesion_scores(prediction, reference, ONE_MM, rule)
        assert counts(row) == (found, 1 - found, 1 - found, 0)


def test_corners_join_components():
    reference = volume((20, 20, 20))
    specks = np.zeros_like(reference)
    specks[2, 2, 2] = specks[3, 3, 3] = True
    assert lesion_scores(reference | specks, reference, ONE_MM)["lesions_false"] == 1


def test_a_component_across_two_lesions_belongs_to_both():
    reference = volume((2, 2, 2), (2, 2, 22))
    prediction = reference.copy()
    prediction[3:5, 3:5, 2:26] = True
    row = lesion_scores(prediction, reference, ONE_MM)
    assert counts(row) == (2, 0, 0, 0)
    size = int(prediction.sum())
    assert row["lesion_dice"] == pytest.approx(2 * 64 / (64 + size))
    first = volume((2, 2, 2))
    expected = hd95_max(prediction, first, ONE_MM)
    assert row["lesion_hd95_mm"] == pytest.approx(expected)


def test_parts_of_a_lesion_are_scored_together():
    reference = np.zeros((20, 20, 20), bool)
    reference[2:6, 2:6, 2:14] = True
    prediction = reference.copy()
    prediction[:, :, 8] = False
    row = lesion_scores(prediction, reference, ONE_MM)
    assert counts(row) == (1, 0, 0, 0)
    assert row["lesion_dice"] == pytest.approx(2 * 176 / (176 + 192))


def plain_loop(prediction, reference, spacing, rule):
    """The challenge's rules lesion by lesion on whole arrays, grown one at a time."""
    corners = np.ones((3, 3, 3))
    edges = ndimage.generate_binary_structure(3, 2)
    steps = rule.dilation_voxels
    predicted, n_predicted = ndimage.label(prediction, corners)
    zones, n_zones = ndimage.label(
        ndimage.binary_dilation(reference, edges, iterations=steps), corners
    )
    dices, distances, touched, ignored = [], [], set(), 0
    for zone in range(1, n_zones + 1):
        lesion = reference & (zones == zone)
        grown = ndimage.binary_dilation(lesion, edges, iterations=steps)
        members = set(np.unique(predicted[grown])) - {0}
        touched |= members
        if lesion.sum() * np.prod(spacing) <= rule.smallest_mm3:
            ignored += 1
            continue
        part = np.isin(predicted, list(members))
        dices.append(2 * (part & lesion).sum() / (part.sum() + lesion.sum()))
        far = hd95_max(part, lesion, spacing) if members else rule.penalty_mm
        distances.append(far)
    false = n_predicted - len(touched)
    total = len(dices) + false
    dice = sum(dices) / total if total else 1.0
    far = (sum(distances) + false * rule.penalty_mm) / total if total else 0.0
    return dice, far, false, ignored


@pytest.mark.parametrize("task", LESION_RULES)
@pytest.mark.parametrize("seed", range(4))
def test_noisy_lesions_agree_with_a_plain_loop(task, seed):
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.normal(size=(36, 30, 28)), 1.6)
    other = ndimage.gaussian_filter(random.normal(size=smooth.shape), 1.2)
    reference = smooth > np.quantile(smooth, 0.96)
    mixed = smooth + 0.5 * other
    prediction = mixed > np.quantile(mixed, 0.96)
    spacing, rule = (1.0, 0.9, 1.5), LESION_RULES[task]
    row = lesion_scores(prediction, reference, spacing, rule)
    dice, far, false, ignored = plain_loop(prediction, reference, spacing, rule)
    assert row["lesion_dice"] == pytest.approx(dice, rel=1e-12)
    assert row["lesion_hd95_mm"] == pytest.approx(far, rel=1e-12)
    assert (row["lesions_false"], row["lesions_ignored"]) == (false, ignored)
    assert 0 < row["lesion_dice"] < 1


def test_the_tasks_of_the_challenge():
    assert LESION_RULES["GLI"] == LesionRule(3, 50.0, 374.0)
    assert LESION_RULES["MEN"] == LesionRule(1, 50.0, 374.0)
    assert LESION_RULES["MET"] == LesionRule(1, 2.0, 374.0)


def test_bad_rules_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="bad lesion rule"):
        LesionRule(dilation_voxels=-1)
    with pytest.raises(ConfigError, match="GLI, SSA, PED, MEN, MET"):
        evaluate_case(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), ONE_MM, {}, lesions="X")
    with pytest.raises(GeometryError, match="shapes"):
        lesion_scores(volume(), volume(shape=(4, 4, 4)), ONE_MM)


def test_evaluation_cuts_away_nothing_that_matters():
    """Surroundings outside the box of the labels still join lesions and components."""
    reference = np.uint8(volume((0, 0, 0), (0, 0, 10)))
    prediction = np.uint8(volume((0, 0, 0)))
    whole = lesion_scores(prediction == 1, reference == 1, ONE_MM)
    row = evaluate_case(prediction, reference, ONE_MM, {"a": (1,)}, lesions="gli")["a"]
    assert {key: row[key] for key in whole} == whole
    assert (
        "lesion_dice"
        not in evaluate_case(prediction, reference, ONE_MM, {"a": (1,)})["a"]
    )


def test_ignored_voxels_make_no_false_lesion():
    reference, prediction = np.uint8(volume((20, 20, 20))), np.uint8(volume((2, 2, 2)))
    reference[2:6, 2:6, 2:6] = 9
    scheme = LabelScheme({"background": 0, "a": 1}, ignore_label=9)
    row = evaluate_case(prediction, reference, ONE_MM, scheme, lesions="GLI")["a"]
    assert counts(row) == (0, 1, 0, 0)


def test_folder_scores_hold_lesions_under_names_of_their_own(tmp_path):
    reference = np.uint8(volume((2, 2, 2), (20, 20, 20)))
    for name, corners in (("a", [(2, 2, 2)]), ("b", [(2, 2, 2), (20, 20, 20)])):
        for folder, array in (("r", reference), ("p", np.uint8(volume(*corners)))):
            write_label_map(tmp_path / folder / f"{name}.nii.gz", array, np.eye(4))
    metrics = evaluate_folder(tmp_path / "p", tmp_path / "r", lesions="GLI")
    row = metrics["summary"]["1"]
    assert row["lesion_dice"]["mean"] == 0.75
    assert row["dice"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert row["lesion_hd95_mm"]["mean"] == pytest.approx(187 / 2)
    assert (row["lesions_found"], row["lesions_missed"]) == (3, 1)
    assert metrics["mean"]["lesion_dice"] == 0.75
    assert "374 mm" in metrics["rules"]["lesion_wise"]


def test_a_whole_brain_takes_seconds():
    """One BraTS case with a tumour, 30 metastases and 300 false specks."""
    random = np.random.default_rng(0)
    shape = (240, 240, 155)
    grid = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij")
    reference = sum((g - c) ** 2 for g, c in zip(grid, (100, 120, 70), strict=True))
    reference = np.asarray(reference) < 35**2
    for place in random.integers(20, 130, (30, 3)):
        i, j, k = place
        reference[i : i + 6, j + 60 : j + 66, k : k + 6] = True
    prediction = np.roll(reference, 1, axis=0)
    prediction[tuple(random.integers(0, 155, (3, 300)))] = True
    start = time.process_time()
    row = lesion_scores(prediction, reference, ONE_MM)
    assert time.process_time() - start < 5.0
    assert row["lesions_false"] > 100
