"""Whole label maps and folders of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from segmamba import atomic
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, FormatError, GeometryError
from segmamba.evaluation import evaluate_case, evaluate_folder
from segmamba.io import read_volume, write_label_map

SPACING = (1.0, 1.0, 2.0)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


def label_map(shift=0):
    """A 4 x 4 x 4 block of label 1 on a block of label 2."""
    array = np.zeros((16, 12, 10), np.uint8)
    array[2 + shift : 6 + shift, 2:6, 2:6] = 1
    array[6 + shift : 10 + shift, 2:6, 2:6] = 2
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases: one exact, one moved by a voxel (1 mm)."""
    for name, shift in (("a", 0), ("b", 1)):
        reference = tmp_path / "references" / f"{name}.nii.gz"
        write_label_map(reference, label_map(), AFFINE)
        prediction = tmp_path / "predictions" / f"{name}.nii.gz"
        write_label_map(prediction, label_map(shift), AFFINE)
    return tmp_path / "predictions", tmp_path / "references"


def test_a_moved_block_has_its_known_scores():
    scheme = LabelScheme({"background": 0, "one": 1, "two": 2})
    rows = evaluate_case(label_map(1), label_map(), SPACING, scheme)
    assert list(rows) == ["one", "two"]
    row = rows["one"]
    assert row["dice"] == pytest.approx(0.75)
    assert row["hd95_mm"] == row["hd95_max_mm"] == pytest.approx(1.0)
    assert row["surface_dice"] == 1.0
    assert row["volume_ml"] == row["reference_volume_ml"] == pytest.approx(0.128)
    assert row["volume_error_ml"] == 0.0
    assert not row["empty_reference"]
    strict = evaluate_case(label_map(1), label_map(), SPACING, scheme, tolerance_mm=0.5)
    # A block has 64 - 8 border voxels; the two share 3 rings of 12 exactly.
    assert strict["one"]["surface_dice"] == pytest.approx(2 * 36 / (2 * 56))


def test_regions_unite_their_labels():
    scheme = LabelScheme(
        {"background": 0, "one": 1, "two": 2},
        regions={"all": (1, 2), "core": (1,)},
        regions_order=(2, 1),
    )
    rows = evaluate_case(label_map(1), label_map(), SPACING, scheme)
    assert rows["all"]["dice"] == pytest.approx(7 / 8)
    assert rows["core"]["dice"] == pytest.approx(0.75)


def test_ignored_voxels_count_for_nothing():
    reference, prediction = label_map(), label_map()
    reference[2:4, 2:6, 2:6] = 9
    prediction[2:4, 2:6, 2:6] = 2
    scheme = LabelScheme({"background": 0, "one": 1, "two": 2}, ignore_label=9)
    rows = evaluate_case(prediction, reference, SPACING, scheme)
    assert rows["one"]["dice"] == rows["two"]["dice"] == 1.0
    assert rows["one"]["reference_volume_ml"] == pytest.approx(0.064)


def test_empty_labels_are_penalised_by_the_whole_image_and_counted(folders):
    predictions, references = folders
    write_label_map(predictions / "b.nii.gz", np.uint8(label_map() == 1), AFFINE)
    metrics = evaluate_folder(predictions, references)
    diagonal = np.sqrt(16**2 + 12**2 + 20**2)
    assert metrics["cases"]["b"]["2"]["hd95_mm"] == pytest.approx(diagonal)
    assert metrics["cases"]["b"]["2"]["dice"] == 0.0
    row = metrics["summary"]["2"]
    assert (row["empty_prediction"], row["empty_reference"]) == (1, 0)
    assert (row["both_empty"], row["penalised"], row["cases"]) == (0, 1, 2)
    chosen = evaluate_folder(predictions, references, penalty_mm=373.13)
    assert chosen["cases"]["b"]["2"]["hd95_max_mm"] == 373.13
    assert "373.13" in chosen["rules"]["one_empty"]


def test_both_empty_is_agreement_and_counted():
    groups = {"there": (1,), "absent": (7,)}
    row = evaluate_case(label_map(), label_map(), SPACING, groups)["absent"]
    assert (row["dice"], row["hd95_mm"], row["surface_dice"]) == (1.0, 0.0, 1.0)
    nothing = np.zeros((4, 4, 4), np.uint8)
    row = evaluate_case(nothing, nothing, SPACING, groups)["there"]
    assert (row["dice"], row["hd95_mm"]) == (1.0, 0.0)


def test_differing_voxels_are_counted(folders):
    metrics = evaluate_folder(*folders)
    voxels = np.count_nonzero(label_map() != label_map(1))
    assert metrics["differing_voxels"] == {
        "largest": voxels / 1920,
        "cases": {"a": 0.0, "b": voxels / 1920},
    }


def test_metrics_json_has_the_stated_form(folders, tmp_path):
    metrics = evaluate_folder(*folders, workers=1)
    atomic.write_json(tmp_path / "metrics.json", metrics)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert list(read) == [
        *("cases", "summary", "mean", "differing_voxels", "unmatched", "rules")
    ]
    assert read["cases"]["a"]["1"]["dice"] == 1.0
    assert read["cases"]["b"]["1"]["dice"] == 0.75
    row = read["summary"]["1"]["dice"]
    assert row["mean"] == pytest.approx(0.875)
    assert row["ci95"] == [0.75, 1.0]
    assert row["n"] == 2
    assert read["mean"]["dice"] == pytest.approx(0.875)
    assert read["mean"]["hd95_mm"] == pytest.approx(0.5)


def test_a_dataset_json_names_the_labels(folders, tmp_path):
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2},
        "regions_class_order": [1, 2],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    path = tmp_path / "dataset.json"
    atomic.write_json(path, description)
    metrics = evaluate_folder(*folders, labels=path)
    assert list(metrics["summary"]) == ["whole", "core"]
    assert metrics["cases"]["b"]["whole"]["dice"] == pytest.approx(7 / 8)


def test_progress_names_each_case(folders):
    seen = []
    evaluate_folder(*folders, progress=lambda *row: seen.append(row))
    assert sorted(seen[-1][:2]) == [2, 2]
    assert {row[2] for row in seen} == {"a", "b"}


def test_another_grid_is_refused_with_the_difference(folders):
    predictions, references = folders
    moved = AFFINE.copy()
    moved[0, 3] = 5.0
    write_label_map(predictions / "b.nii.gz", label_map(), moved)
    with pytest.raises(GeometryError, match=r"case b: .*5 mm"):
        evaluate_folder(predictions, references)
    write_label_map(predictions / "b.nii.gz", label_map()[:-1], AFFINE)
    with pytest.raises(GeometryError, match=r"shape \(15, 12, 10\) instead of"):
        evaluate_folder(predictions, references)


def test_missing_predictions_are_an_error_unless_allowed(folders):
    predictions, references = folders
    (predictions / "b.nii.gz").unlink()
    with pytest.raises(FormatError, match=r"1 references have no prediction.*b"):
        evaluate_folder(predictions, references)
    metrics = evaluate_folder(predictions, references, allow_missing=True)
    assert metrics["unmatched"] == {"references": ["b"], "predictions": []}


def test_predictions_without_reference_are_listed(folders):
    predictions, references = folders
    write_label_map(predictions / "c.nii.gz", label_map(), AFFINE)
    metrics = evaluate_folder(predictions, references)
    assert metrics["unmatched"]["predictions"] == ["c"]
    assert set(metrics["cases"]) == {"a", "b"}


def test_nothing_in_common_is_an_error(folders, tmp_path):
    predictions, _ = folders
    write_label_map(tmp_path / "other" / "z.nii.gz", label_map(), AFFINE)
    with pytest.raises(FormatError, match=r"names such as z, found a, b"):
        evaluate_folder(predictions, tmp_path / "other")


def test_missing_and_empty_folders_are_errors(folders, tmp_path):
    predictions, references = folders
    with pytest.raises(FormatError, match="no such folder"):
        evaluate_folder(tmp_path / "nowhere", references)
    with pytest.raises(FormatError):
        evaluate_folder(predictions, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="none in it"):
        evaluate_folder(tmp_path / "empty", references)


def test_two_predictions_of_one_case_are_refused(folders):
    predictions, references = folders
    write_label_map(predictions / "b.nrrd", label_map(), AFFINE)
    with pytest.raises(FormatError, match=r"b\.nii\.gz and b\.nrrd"):
        evaluate_folder(predictions, references)


@pytest.mark.parametrize("ending", ["-seg", "_seg"])
def test_a_label_map_goes_before_the_image_beside_it(folders, ending):
    predictions, references = folders
    (references / "b.nii.gz").rename(references / f"b{ending}.nii.gz")
    write_label_map(references / "b.nii.gz", label_map() + 1, AFFINE)  # an image
    metrics = evaluate_folder(predictions, references)
    assert metrics["cases"]["b"]["1"]["dice"] == 0.75
    assert set(metrics["summary"]) == {"1", "2"}


def test_a_broken_file_is_named(folders):
    predictions, references = folders
    (predictions / "b.nii.gz").write_bytes(b"not a scan")
    with pytest.raises(FormatError, match=r"b\.nii\.gz"):
        evaluate_folder(predictions, references)


def test_fractional_labels_are_refused(folders):
    from segmamba.io import Volume, write_volume

    predictions, references = folders
    soft = (label_map() * 0.5).astype(np.float32)[None]
    write_volume(predictions / "b.nii.gz", Volume(soft, AFFINE))
    with pytest.raises(FormatError, match="fractional"):
        evaluate_folder(predictions, references)


def test_integers_without_a_name_are_refused(folders):
    """A 3 where the labels say 4 must not pass as an empty region."""
    scheme = LabelScheme({"background": 0, "one": 1, "four": 4})
    with pytest.raises(FormatError, match="expected 0, 1, 4, found 2"):
        evaluate_folder(*folders, labels=scheme)


@pytest.mark.parametrize("option", ["tolerance_mm", "penalty_mm"])
def test_bad_options_are_refused(folders, option):
    with pytest.raises(ConfigError, match="-1"):
        evaluate_folder(*folders, **{option: -1.0})


def test_two_files_can_be_compared(folders):
    predictions, references = folders
    metrics = evaluate_folder(predictions / "b.nii.gz", references / "a.nii.gz")
    assert metrics["cases"]["b"]["1"]["dice"] == 0.75


def test_brats_data_set_as_reference(shared_data, tmp_path):
    """One predicted case of five, regions from the layout, empty ET counted."""
    name = "BraTS2021_01480"
    truth = read_volume(shared_data / "BraTS" / name / f"{name}_seg.nii.gz")
    write_label_map(tmp_path / f"{name}.nii.gz", truth.array[0], truth.affine)
    metrics = evaluate_folder(tmp_path, shared_data / "BraTS")
    assert list(metrics["summary"]) == ["WT", "TC", "ET"]
    assert metrics["mean"]["dice"] == 1.0
    assert metrics["summary"]["ET"]["both_empty"] == 1
    assert len(metrics["unmatched"]["references"]) == 4


@pytest.mark.parametrize("change", ["shift", "specks"])
def test_one_brats_case_takes_under_a_second(shared_data, change):
    """About 0.2 s of one core; stray voxels all over the image must not blow it up."""
    name = "BraTS2021_01479"
    truth = read_volume(shared_data / "BraTS" / name / f"{name}_seg.nii.gz")
    reference = truth.array[0]
    prediction = np.roll(reference, (2, 1, -1), (0, 1, 2))
    if change == "specks":
        prediction[5, 5, 5] = prediction[230, 230, 150] = 4
    start = time.process_time()
    rows = evaluate_case(prediction, reference, truth.spacing_mm, BRATS)
    assert time.process_time() - start < 1.0
    assert rows["WT"]["hd95_mm"] == pytest.approx(np.sqrt(5))
    assert 0.9 < rows["WT"]["dice"] < 0.93
