"""Largest component, minimal size and holes on shapes drawn by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from segmamba.data.labels import LabelScheme
from segmamba.data.layouts.brats import brats_labels
from segmamba.errors import ConfigError, FormatError, GeometryError
from segmamba.inference.postprocessing import (
    Postprocessing,
    PostprocessingStep,
    apply_postprocessing,
    largest_component,
    load_postprocessing,
    save_postprocessing,
    without_holes,
    without_small_components,
)
from segmamba.inference.postprocessing_choice import (
    HeldOutCase,
    decide_postprocessing,
)
from segmamba.io import write_label_map

CLASSES = LabelScheme({"background": 0, "liver": 1, "tumour": 2})
BRATS = brats_labels()
MM = (1.0, 1.0, 1.0)


def step(
    label: str, operation: str, min_volume_mm3: float | None = None
) -> PostprocessingStep:
    return PostprocessingStep(label, operation, min_volume_mm3)  # type: ignore


def empty(*shape: int) -> np.ndarray:
    return np.zeros(shape or (12, 12, 12), np.uint8)


def apply(label_map: np.ndarray, scheme: LabelScheme, *steps, spacing=MM):
    return apply_postprocessing(label_map, spacing, steps, scheme)


def loop_components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Find components by walking from voxel to voxel."""
    left = {tuple(map(int, voxel)) for voxel in np.argwhere(mask)}
    around = [tuple(np.array(o) - 1) for o in np.ndindex(3, 3, 3)]
    found = []
    while left:
        seeds = [left.pop()]
        component = set(seeds)
        while seeds:
            i, j, k = seeds.pop()
            for a, b, c in around:
                voxel = (i + a, j + b, k + c)
                if voxel in left:
                    left.remove(voxel)
                    component.add(voxel)
                    seeds.append(voxel)
        found.append(component)
    return found


def drawn(voxels, shape) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_components_are_those_of_a_walk(share):
    mask = np.random.default_rng(3).random((11, 9, 10)) < share
    components = loop_components(mask)
    most = max(map(len, components))
    kept = largest_component(mask)
    assert kept.sum() == most
    assert any((drawn(c, mask.shape) == kept).all() for c in components)
    for size in (1, 2, 3.5, most, most + 1):
        wanted = {v for c in components if len(c) >= size for v in c}
        found = without_small_components(mask, size)
        np.testing.assert_array_equal(found, drawn(wanted, mask.shape))


def test_corners_join_and_gaps_part():
    mask = np.zeros((6, 6, 6), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = True  # joined by corners
    mask[4:, 4, 4] = True
    kept = largest_component(mask)
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_an_empty_mask_stays_empty():
    mask = np.zeros((3, 3, 3), bool)
    for function in (largest_component, without_holes):
        assert not function(mask).any()
    assert not without_small_components(mask, 2).any()


def test_holes_are_what_is_enclosed():
    mask = np.zeros((7, 7, 7), bool)
    mask[1:6, 1:6, 1:6] = True
    mask[3, 3, 3] = False  # enclosed
    mask[2, 2, 1:3] = False  # open to one side
    filled = without_holes(mask)
    assert filled[3, 3, 3]
    assert not filled[2, 2, 1:3].any()
    assert filled.sum() == mask.sum() + 1


def test_a_hole_open_to_the_images_border_is_none():
    label_map = empty(5, 5, 5)
    label_map[:, 1:4, 1:4] = 1
    label_map[:, 2, 2] = 0  # a tunnel from end to end
    filled = apply(label_map, CLASSES, step("liver", "fill-holes"))
    np.testing.assert_array_equal(filled, label_map)
    label_map[0, 2, 2] = label_map[4, 2, 2] = 1
    filled = apply(label_map, CLASSES, step("liver", "fill-holes"))
    assert (filled[:, 2, 2] == 1).all()


def test_a_class_keeps_its_largest_component_and_others_stay():
    label_map = empty()
    label_map[1:5, 1:5, 1:5] = 1
    label_map[8:10, 8:10, 8:10] = 1
    label_map[8, 8, 5] = 2
    before = label_map.copy()
    found = apply(label_map, CLASSES, step("liver", "largest-component"))
    assert (found[1:5, 1:5, 1:5] == 1).all()
    assert (found == 1).sum() == 64
    assert found[8, 8, 5] == 2
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(label_map, before)


def test_a_hole_that_is_another_class_is_left():
    label_map = empty()
    label_map[1:8, 1:8, 1:8] = 1
    label_map[3, 3, 3] = 2
    label_map[5, 5, 5] = 0
    found = apply(label_map, CLASSES, step("liver", "fill-holes"))
    assert found[3, 3, 3] == 2
    assert found[5, 5, 5] == 1


def test_sizes_are_in_cubic_millimetres():
    label_map = empty()
    label_map[1, 1, 1:4] = 1  # 3 voxels of 2.5 mm3: 7.5 mm3
    label_map[6, 6, 1:6] = 1  # 5: 12.5 mm3
    spacing = (1.0, 0.5, 5.0)
    for volume, voxels in ((7.5, 8), (7.6, 5), (12.5, 5), (12.6, 0)):
        rule = step("liver", "minimal-size", volume)
        found = apply(label_map, CLASSES, rule, spacing=spacing)
        assert (found == 1).sum() == voxels, volume


def nested() -> np.ndarray:
    """A tumour of oedema, core and enhancing parts, and a small one beside it."""
    label_map = empty(16, 16, 16)
    label_map[1:9, 1:9, 1:9] = 2
    label_map[3:7, 3:7, 3:7] = 1
    label_map[4:6, 4:6, 4:6] = 3
    label_map[11:15, 11:15, 11:15] = 2
    label_map[12:14, 12:14, 12:14] = 1
    label_map[12, 12, 12] = 3
    return label_map


def regions(label_map: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.isin(label_map, group) for name, group in BRATS.evaluated.items()}


@pytest.mark.parametrize(
    ("label", "changed"),
    [("ET", {"ET"}), ("TC", {"ET", "TC"}), ("WT", {"ET", "TC", "WT"})],
)
def test_leaving_a_region_leaves_what_lies_in_it(label, changed):
    before = nested()
    after = apply(before, BRATS, step(label, "largest-component"))
    small = np.zeros_like(before, bool)
    small[10:, 10:, 10:] = True
    for name, mask in regions(before).items():
        wanted = mask & ~small if name in changed else mask
        np.testing.assert_array_equal(regions(after)[name], wanted, err_msg=name)


def test_a_hole_in_a_region_enters_those_around_it():
    before = nested()
    before[4, 4, 4] = 0  # a hole in all regions
    core = apply(before, BRATS, step("TC", "fill-holes"))
    assert core[4, 4, 4] == 1  # in TC and WT, not in ET
    whole = apply(before, BRATS, step("WT", "fill-holes"))
    assert whole[4, 4, 4] == 2  # in WT alone
    before = nested()
    before[3:7, 3:7, 3:7] = 3
    before[4, 4, 4] = 2
    enhancing = apply(before, BRATS, step("ET", "fill-holes"))
    assert enhancing[4, 4, 4] == 3
    for label_map in (core, whole, enhancing):
        found = regions(label_map)
        assert (found["ET"] <= found["TC"]).all()
        assert (found["TC"] <= found["WT"]).all()


def test_random_regions_stay_nested_and_each_step_does_its_work():
    label_map = np.random.default_rng(0).choice(
        4, (10, 11, 12), p=[0.9, 0.03, 0.05, 0.02]
    )
    for name in BRATS.evaluated:
        found = regions(apply(label_map, BRATS, step(name, "largest-component")))
        before = regions(label_map)
        np.testing.assert_array_equal(found[name], largest_component(before[name]))
        assert (found["ET"] <= found["TC"]).all()
        assert (found["TC"] <= found["WT"]).all()


def test_steps_follow_one_another():
    label_map = empty()
    label_map[1:6, 1:6, 1:6] = 1
    label_map[3, 3, 3] = 2
    drop, fill = step("tumour", "minimal-size", 5), step("liver", "fill-holes")
    assert apply(label_map, CLASSES, drop, fill)[3, 3, 3] == 1
    assert apply(label_map, CLASSES, fill, drop)[3, 3, 3] == 0


def test_a_file_gives_the_same_steps_back(tmp_path: Path):
    path = tmp_path / "postprocessing.json"
    steps = (step("liver", "largest-component"), step("tumour", "minimal-size", 30.0))
    saved = Postprocessing(steps, {"cases": 3})
    save_postprocessing(path, saved)
    assert load_postprocessing(path, CLASSES) == saved
    with pytest.raises(ConfigError, match=r"unknown label.*WT, TC, ET.*liver"):
        load_postprocessing(path, BRATS)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"operation": "largest"}, "largest-component"),
        ({"operatoin": "fill-holes"}, "operation"),
        ({"min_volume_mm3": 3.0}, "min_volume_mm3 for largest-component"),
        ({"operation": "minimal-size"}, "min_volume_mm3 for minimal-size"),
        ({"operation": "minimal-size", "min_volume_mm3": -1.0}, "above 0"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, edit: dict, text: str):
    path = tmp_path / "postprocessing.json"
    row = {"label": "liver", "operation": "largest-component", **edit}
    path.write_text(json.dumps({"steps": [row]}))
    with pytest.raises(ConfigError, match=text):
        load_postprocessing(path, CLASSES)


# ------------------------------------------------------------------------ the decision


def write_cases(
    folder: Path, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> list[HeldOutCase]:
    cases = []
    for index, (found, truth) in enumerate(pairs):
        paths = [folder / f"{kind}_{index}.nii.gz" for kind in ("found", "truth")]
        for path, label_map in zip(paths, (found, truth), strict=True):
            write_label_map(path, label_map, np.eye(4))
        cases.append(HeldOutCase(str(index), *paths))
    return cases


def liver_with_islands(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    truth = empty(24, 24, 24)
    truth[2:10, 2:10, 2:10] = 1
    truth[4:6, 4:6, 4:6] = 2
    found = truth.copy()
    for row, size in enumerate(sizes):
        found[14 + 2 * row, 14, 2 : 2 + size] = 1
    return found, truth


def test_islands_are_dropped_and_the_gain_is_told(tmp_path: Path):
    cases = write_cases(tmp_path, [liver_with_islands(5, 7), liver_with_islands(9)])
    chosen = decide_postprocessing(cases, CLASSES, workers=1)
    # The largest component and 10 mm3 do the same: the first of equals is taken.
    assert chosen.steps == (step("liver", "largest-component"),)
    decision = chosen.decision
    liver = [2 * 504 / (2 * 504 + islands) for islands in (12, 9)]
    assert decision["dice_before"]["liver"] == pytest.approx(np.mean(liver))
    assert decision["dice_before"]["tumour"] == 1
    assert decision["dice_after"] == {"liver": 1, "tumour": 1}
    adopted = [row for row in decision["candidates"] if row["adopted"]]
    assert [row["operation"] for row in adopted] == ["largest-component"]
    gain = 1 - np.mean(liver)
    assert adopted[0]["gain"] == pytest.approx(gain / 2)
    assert adopted[0]["gain_by_label"] == pytest.approx({"liver": gain, "tumour": 0})
    assert len(decision["candidates"]) == 2 * 8  # losers too
    json.dumps(dataclasses.asdict(chosen), allow_nan=False)


def test_two_real_parts_keep_off_the_largest_component(tmp_path: Path):
    found, truth = liver_with_islands(5)
    truth[14:20, 14:20, 14:20] = found[14:20, 14:20, 14:20] = 1  # joins the island
    found[20:22, 2, 2:4] = 1  # 4 mm3 too much
    chosen = decide_postprocessing(write_cases(tmp_path, [(found, truth)]), CLASSES)
    assert chosen.steps == (step("liver", "minimal-size", 10.0),)


def test_nothing_is_adopted_where_all_is_well(tmp_path: Path):
    truth = liver_with_islands()[1]
    chosen = decide_postprocessing(write_cases(tmp_path, [(truth, truth)]), CLASSES)
    assert chosen.steps == ()
    assert chosen.decision["mean_dice_after"] == chosen.decision["mean_dice_before"]
    assert not any(row["adopted"] for row in chosen.decision["candidates"])


def test_no_label_may_lose_for_another_to_win(tmp_path: Path):
    """Dropping the small WT mends WT but takes a true ET along: not adopted."""
    truth = empty(20, 20, 20)
    truth[1:9, 1:9, 1:9] = 2
    truth[14, 14, 14] = 3  # a true metastasis, drawn far too large
    found = truth.copy()
    found[13:16, 13:16, 13:16] = 2
    found[14, 14, 14] = 3
    chosen = decide_postprocessing(write_cases(tmp_path, [(found, truth)]), BRATS)
    rows = chosen.decision["candidates"]
    first = rows[0]
    assert (first["label"], first["operation"]) == ("WT", "largest-component")
    assert first["gain_by_label"]["WT"] > 0
    assert first["gain_by_label"]["ET"] < 0
    assert not first["adopted"]
    assert chosen.steps == ()


def test_holes_are_filled_after_the_islands(tmp_path: Path):
    found, truth = liver_with_islands(3)
    found[7, 7, 7] = 0
    chosen = decide_postprocessing(write_cases(tmp_path, [(found, truth)]), CLASSES)
    assert [s.operation for s in chosen.steps] == ["largest-component", "fill-holes"]
    assert chosen.decision["mean_dice_after"] == 1


def test_ignored_voxels_judge_nothing(tmp_path: Path):
    scheme = LabelScheme({"background": 0, "liver": 1, "tumour": 2}, ignore_label=9)
    found, truth = liver_with_islands(5)
    truth[14] = 9  # the island lies where nobody looked
    chosen = decide_postprocessing(write_cases(tmp_path, [(found, truth)]), scheme)
    assert chosen.steps == ()


def test_what_can_not_be_decided_is_said(tmp_path: Path):
    with pytest.raises(FormatError, match="no held-out case"):
        decide_postprocessing([], CLASSES)
    found, truth = liver_with_islands()
    cases = write_cases(tmp_path, [(found[:-1], truth)])
    with pytest.raises(GeometryError, match="differ in shape"):
        decide_postprocessing(cases, CLASSES)


def test_progress_counts_all_rounds(tmp_path: Path):
    cases = write_cases(tmp_path, [liver_with_islands()] * 3)
    seen = []
    decide_postprocessing(cases, CLASSES, progress=lambda *a: seen.append(a[:2]))
    assert seen == [(n, 12) for n in range(1, 13)]
