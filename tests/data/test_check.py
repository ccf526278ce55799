"""Each kind of problem is found, by file and with its size; sound data give none."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from segmamba.atomic import write_json
from segmamba.data.case_check import CaseFacts, check_case
from segmamba.data.check import CheckReport, check_dataset
from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts import load_dataset
from segmamba.errors import ConfigError, FormatError
from segmamba.io import Volume, write_label_map, write_volume

SHAPE = (6, 5, 4)


def image(path: Path, seed: int, array=None, affine=None) -> Path:
    if array is None:
        array = np.random.default_rng(seed).normal(size=(1, *SHAPE)).astype(np.float32)
    write_volume(path, Volume(array, np.eye(4) if affine is None else affine))
    return path


def label(path: Path, values=(1, 2), shape=SHAPE, affine=None) -> Path:
    label_map = np.zeros(shape, np.uint8)
    label_map.flat[: len(values)] = values
    write_label_map(path, label_map, np.eye(4) if affine is None else affine)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound Decathlon data set of four cases."""
    listed = []
    for index, name in enumerate("abcd"):
        image(tmp_path / f"imagesTr/{name}.nii.gz", index)
        label(tmp_path / f"labelsTr/{name}.nii.gz")
        pair = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        listed.append(pair)
    labels = {"0": "background", "1": "head", "2": "tail"}
    description = {"modality": {"0": "MRI"}, "labels": labels, "training": listed}
    write_json(tmp_path / "dataset.json", description)
    return tmp_path


def found(report: CheckReport) -> set[tuple[str, str, str]]:
    """Severity, file and kind of each problem."""
    return {(p.severity, p.file, p.kind) for p in report.problems}


def message(report: CheckReport, kind: str) -> str:
    return next(p.message for p in report.problems if p.kind == kind)


def edit(root: Path, change) -> None:
    data = json.loads((root / "dataset.json").read_text())
    change(data)
    write_json(root / "dataset.json", data)


def test_sound_data_have_no_problems(root: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    report = check_dataset(root, progress=lambda *call: calls.append(call))
    assert report.problems == ()
    assert report.ok
    assert report.conclusion() == "4 labelled cases: no errors, no notes."
    assert (report.num_cases, report.layout) == (4, "msd")
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(call[2] for call in calls) == list("abcd")
    assert check_dataset(load_dataset(root), workers=1) == report


def test_missing_files(root: Path) -> None:
    (root / "imagesTr/a.nii.gz").unlink()
    (root / "labelsTr/b.nii.gz").unlink()
    assert found(check_dataset(root)) == {
        ("error", "imagesTr/a.nii.gz", "missing-channel"),
        ("error", "labelsTr/b.nii.gz", "missing-label"),
    }


def test_orphans_half_a_pair_is_an_error_a_pair_is_a_note(root: Path) -> None:
    image(root / "imagesTr/x.nii.gz", 10)
    label(root / "labelsTr/y.nii.gz")
    image(root / "imagesTr/z.nii.gz", 11)
    label(root / "labelsTr/z.nii.gz")
    image(root / "elsewhere/w.nii.gz", 12)
    report = check_dataset(root)
    assert found(report) == {
        ("error", "imagesTr/x.nii.gz", "orphan-image"),
        ("error", "labelsTr/y.nii.gz", "orphan-label"),
        ("note", "imagesTr/z.nii.gz", "orphan-image"),
        ("note", "labelsTr/z.nii.gz", "orphan-label"),
        ("note", "elsewhere/w.nii.gz", "orphan-file"),
    }
    assert "no label for it" in message(report, "orphan-image")


def test_shape_and_affine_mismatch_with_their_size(root: Path) -> None:
    label(root / "labelsTr/a.nii.gz", shape=(6, 5, 3))
    moved = np.eye(4)
    moved[1, 3] = 2.5
    label(root / "labelsTr/b.nii.gz", affine=moved)
    report = check_dataset(root)
    assert found(report) == {
        ("error", "labelsTr/a.nii.gz", "shape-mismatch"),
        ("error", "labelsTr/b.nii.gz", "affine-mismatch"),
    }
    assert "(6, 5, 3) instead of (6, 5, 4)" in message(report, "shape-mismatch")
    assert "2.5 mm (2.5 voxels)" in message(report, "affine-mismatch")
    assert "a.nii.gz" in message(report, "shape-mismatch")


def test_unexpected_values_are_counted(root: Path) -> None:
    label(root / "labelsTr/a.nii.gz", values=(1, 2, 7, 7, 9))
    report = check_dataset(root)
    assert found(report) == {("error", "labelsTr/a.nii.gz", "unexpected-label")}
    text = message(report, "unexpected-label")
    assert "7 in 2 voxels, 9 in 1 voxels" in text
    assert "known are 0, 1, 2" in text


def test_float_labels(root: Path) -> None:
    label_map = np.zeros((1, *SHAPE), np.float32)
    label_map.flat[:3] = (1, 2, 2)
    image(root / "labelsTr/a.nii.gz", 0, label_map)
    label_map.flat[3] = 0.5
    image(root / "labelsTr/b.nii.gz", 0, label_map)
    label_map.flat[4] = np.nan
    image(root / "labelsTr/c.nii.gz", 0, label_map)
    report = check_dataset(root)
    assert found(report) == {
        ("note", "labelsTr/a.nii.gz", "float-label"),
        ("error", "labelsTr/b.nii.gz", "float-label"),
        ("error", "labelsTr/c.nii.gz", "float-label"),
        ("error", "labelsTr/c.nii.gz", "not-finite"),
    }
    assert any("0.5 in 1 voxels" in p.message for p in report.errors)


def test_integral_float_labels_alone_are_fine(root: Path) -> None:
    label_map = np.zeros((1, *SHAPE), np.float32)
    label_map.flat[:2] = (1, 2)
    image(root / "labelsTr/a.nii.gz", 0, label_map)
    report = check_dataset(root)
    assert report.ok
    assert len(report.notes) == 1


def test_not_finite_and_constant_images(root: Path) -> None:
    array = np.random.default_rng(9).normal(size=(1, *SHAPE)).astype(np.float32)
    array.flat[:5] = (np.nan, np.nan, np.nan, np.inf, -np.inf)
    image(root / "imagesTr/a.nii.gz", 0, array)
    image(root / "imagesTr/b.nii.gz", 0, np.full((1, *SHAPE), 7, np.int16))
    image(root / "imagesTr/c.nii.gz", 0, np.full((1, *SHAPE), np.nan, np.float32))
    report = check_dataset(root)
    assert found(report) == {
        ("error", "imagesTr/a.nii.gz", "not-finite"),
        ("error", "imagesTr/b.nii.gz", "constant-image"),
        ("error", "imagesTr/c.nii.gz", "constant-image"),
        ("error", "imagesTr/c.nii.gz", "not-finite"),
    }
    assert "3 NaN and 2 infinite voxels of 120" in message(report, "not-finite")
    assert "every voxel is 7" in message(report, "constant-image")


def test_two_constant_images_are_no_duplicates(root: Path) -> None:
    for name in "ab":
        image(root / f"imagesTr/{name}.nii.gz", 0, np.zeros((1, *SHAPE), np.int16))
    kinds = {problem.kind for problem in check_dataset(root).problems}
    assert kinds == {"constant-image"}


def test_unreadable_files(root: Path) -> None:
    path = root / "imagesTr/a.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    (root / "imagesTr/b.nii.gz").write_bytes(b"/annex/objects/SHA256E-s1--a.nii.gz\n")
    (root / "labelsTr/c.nii.gz").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    singular = bytearray((root / "labelsTr/d.nii.gz").read_bytes())
    write_label_map(root / "d.nii", np.ones(SHAPE, int), np.eye(4))
    singular = bytearray((root / "d.nii").read_bytes())
    (root / "d.nii").unlink()
    singular[280:296] = bytes(16)
    (root / "labelsTr/d.nii.gz").write_bytes(singular)
    report = check_dataset(root)
    assert found(report) == {
        ("error", "imagesTr/a.nii.gz", "truncated"),
        ("error", "imagesTr/b.nii.gz", "fake-file"),
        ("error", "labelsTr/c.nii.gz", "fake-file"),
        ("error", "labelsTr/d.nii.gz", "bad-geometry"),
    }
    assert all(str(root) not in problem.message for problem in report.problems)


def test_duplicates(root: Path) -> None:
    array = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    image(root / "imagesTr/c.nii.gz", 0, array, np.eye(4))  # the voxels of a
    report = check_dataset(root)
    assert found(report) == {("error", "imagesTr/c.nii.gz", "duplicate-case")}
    assert "case a" in message(report, "duplicate-case")

    edit(root, lambda data: data["training"].append(data["training"][1]))
    kinds = [p.kind for p in check_dataset(root).problems if p.case == "b"]
    assert sorted(kinds) == ["duplicate-case", "duplicate-id", "duplicate-id"]


def test_empty_and_absent_labels_are_notes(root: Path) -> None:
    for name in "abcd":
        label(root / f"labelsTr/{name}.nii.gz", values=(1,))
    label(root / "labelsTr/a.nii.gz", values=())
    report = check_dataset(root)
    assert report.ok
    assert found(report) == {
        ("note", "labelsTr/a.nii.gz", "empty-label"),
        ("note", "", "absent-label"),
    }
    assert "tail (2)" in message(report, "absent-label")


def test_channel_counts(root: Path) -> None:
    array = np.random.default_rng(7).normal(size=(3, *SHAPE)).astype(np.float32)
    image(root / "imagesTr/a.nii.gz", 0, array)
    image(root / "labelsTr/b.nii.gz", 0, np.ones((2, *SHAPE), np.uint8))
    report = check_dataset(root)
    assert found(report) == {
        ("error", "imagesTr/a.nii.gz", "channel-count"),
        ("error", "labelsTr/b.nii.gz", "channel-count"),
    }
    assert "3 channels instead of 1" in message(report, "channel-count")


def test_spacing_outlier_whatever_the_axis_order(root: Path) -> None:
    for name, spacing in {"a": (5, 1, 1), "b": (1, 1, 5), "c": (1, 5, 1)}.items():
        affine = np.diag([*spacing, 1.0])
        image(root / f"imagesTr/{name}.nii.gz", ord(name), affine=affine)
        label(root / f"labelsTr/{name}.nii.gz", affine=affine)
    report = check_dataset(root)
    assert found(report) == {("note", "imagesTr/d.nii.gz", "spacing-outlier")}
    assert "1 x 1 x 1 mm" in message(report, "spacing-outlier")
    assert "1 x 1 x 5 mm" in message(report, "spacing-outlier")


def test_channels_of_a_case(tmp_path: Path) -> None:
    scheme = LabelScheme(labels={"background": 0, "x": 1, "y": 2})
    first, twin = image(tmp_path / "0.nii", 0), image(tmp_path / "1.nii", 0)
    far = image(tmp_path / "2.nii", 2, affine=np.diag([1.0, 1, 2, 1]))
    case = Case("p", (first, twin, far), label(tmp_path / "l.nii"))
    dataset = Dataset("d", tmp_path, "csv", ("a", "b", "c"), scheme, (case,))
    report = check_dataset(dataset)
    assert found(report) == {
        ("note", "1.nii", "identical-channels"),
        ("error", "2.nii", "affine-mismatch"),
    }
    assert "3 mm (3 voxels) away, compared with 0.nii" in message(
        report, "affine-mismatch"
    )


def test_channels_of_one_name_in_two_folders_all_count(tmp_path: Path) -> None:
    """Cases that share their last channel only, such as an atlas, are no copies."""
    scheme = LabelScheme(labels={"background": 0, "x": 1})
    cases = []
    for seed, name in enumerate(("p", "q"), start=1):
        files = (
            image(tmp_path / f"t1/{name}.nii", seed),
            image(tmp_path / f"atlas/{name}.nii", 0),
        )
        cases.append(Case(name, files, label(tmp_path / f"l/{name}.nii", (1,))))
    dataset = Dataset("d", tmp_path, "csv", ("t1", "a"), scheme, tuple(cases))
    assert check_dataset(dataset).problems == ()


def test_brats_case_without_label_beside_labelled_ones(tmp_path: Path) -> None:
    for index, name in enumerate(("s1", "s2", "s3")):
        for place, kind in enumerate(("t1n", "t1c", "t2w", "t2f")):
            image(tmp_path / f"{name}/{name}-{kind}.nii.gz", 10 * index + place)
        label(tmp_path / f"{name}/{name}-seg.nii.gz", values=(1, 2, 3))
    (tmp_path / "s2/s2-seg.nii.gz").rename(tmp_path / "s2/W39_Segm.nii.gz")
    (tmp_path / "s3/s3-t2w.nii.gz").unlink()
    assert found(check_dataset(tmp_path)) == {
        ("error", "s2", "missing-label"),
        ("error", "s2/W39_Segm.nii.gz", "orphan-scan"),
        ("error", "s3/s3-t2w.nii.gz", "missing-channel"),
    }


def test_report_as_rows_and_json(root: Path) -> None:
    label(root / "labelsTr/b.nii.gz", values=(5,))
    (root / "imagesTr/d.nii.gz").unlink()
    label(root / "labelsTr/a.nii.gz", values=())
    report = check_dataset(root)
    files = [row[2] for row in report.rows()]
    assert files == sorted(files)
    row = ("error", "d", "imagesTr/d.nii.gz", "missing-channel: no such file")
    assert row in report.rows()
    assert report.conclusion() == "4 labelled cases: 2 errors, 2 notes."
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert (data["num_errors"], data["num_notes"]) == (2, 2)
    assert set(data["problems"][0]) == {"case", "file", "kind", "message", "severity"}


def test_workers_do_not_change_the_report(root: Path) -> None:
    (root / "imagesTr/d.nii.gz").unlink()
    label(root / "labelsTr/a.nii.gz", values=(8,))
    assert check_dataset(root, workers=1) == check_dataset(root, workers=4)
    with pytest.raises(ConfigError, match="workers"):
        check_dataset(root, workers=0)


def test_an_interrupt_ends_it_before_all_is_read(root: Path, monkeypatch) -> None:
    begun = []

    def look(dataset: Dataset, case: Case) -> CaseFacts:
        begun.append(case.id)
        time.sleep(0.05)
        return check_case(dataset, case)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("segmamba.data.check.check_case", look)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(root, workers=1, progress=interrupt)
    assert len(begun) < 4


def test_no_data_set_raises(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="recognise"):
        check_dataset(tmp_path)


def test_hippocampus_is_sound_but_for_two_notes(shared_data: Path) -> None:
    report = check_dataset(shared_data / "Task04_Hippocampus")
    assert report.ok
    assert report.num_cases == 208
    assert found(report) == {
        ("note", "labelsTr/hippocampus_003.nii.gz", "float-label"),
        ("note", "labelsTr/hippocampus_243.nii.gz", "float-label"),
    }


def test_brats_sample_is_sound(shared_data: Path) -> None:
    report = check_dataset(shared_data / "BraTS")
    assert report.problems == ()
    assert report.num_cases == 5


@pytest.fixture
def mixed(tmp_path: Path, shared_data: Path) -> Path:
    """Six hippocampi, with all bad inputs among them."""
    names = [f"hippocampus_{n}" for n in ("001", "004", "006", "008", "011", "014")]
    good, bad = shared_data / "Task04_Hippocampus", shared_data / "bad_inputs"
    description = json.loads((good / "dataset.json").read_text())
    description["training"] = [
        item
        for item in description["training"]
        if any(name in item["image"] for name in names)
    ]
    assert len(description["training"]) == 6
    write_json(tmp_path / "dataset.json", description)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copyfile(
                good / folder / f"{name}.nii.gz", tmp_path / folder / f"{name}.nii.gz"
            )
        for path in (bad / folder).iterdir():
            shutil.copyfile(path, tmp_path / folder / path.name)
    return tmp_path


def test_bad_inputs_as_stray_files(mixed: Path, shared_data: Path) -> None:
    for path in (shared_data / "bad_inputs/files").iterdir():
        shutil.copyfile(path, mixed / "imagesTr" / path.name)
    report = check_dataset(mixed)
    errors = {item[1:] for item in found(report) if item[0] == "error"}
    assert errors == {
        ("imagesTr/annex_pointer.nii.gz", "fake-file"),
        ("imagesTr/annex_pointer.nii.gz", "orphan-image"),
        ("imagesTr/hippocampus_118.nii.gz", "orphan-image"),
        ("imagesTr/nan_voxels_3slices.nii", "not-finite"),
        ("imagesTr/nan_voxels_3slices.nii", "orphan-image"),
        ("imagesTr/truncated.nii.gz", "orphan-image"),
        ("imagesTr/truncated.nii.gz", "truncated"),
        ("labelsTr/hippocampus_010.nii.gz", "orphan-label"),
        ("labelsTr/hippocampus_281.nii.gz", "orphan-label"),
    }
    texts = [problem.message for problem in report.errors]
    assert any(
        "512 x 512 x 94 voxels of 0.734 x 0.734 x 5 mm" in text for text in texts
    )


def test_bad_inputs_as_listed_cases(mixed: Path, shared_data: Path) -> None:
    files = shared_data / "bad_inputs/files"
    images = mixed / "imagesTr"
    shutil.copyfile(files / "annex_pointer.nii.gz", images / "hippocampus_001.nii.gz")
    shutil.copyfile(files / "truncated.nii.gz", images / "hippocampus_004.nii.gz")
    shutil.copyfile(files / "nan_voxels_3slices.nii", images / "hippocampus_006.nii.gz")
    shutil.copyfile(
        mixed / "labelsTr/hippocampus_281.nii.gz",
        mixed / "labelsTr/hippocampus_008.nii.gz",
    )

    def list_them(data) -> None:
        for number in ("118", "010", "281"):
            name = f"hippocampus_{number}.nii.gz"
            data["training"].append(
                {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}
            )

    edit(mixed, list_them)
    report = check_dataset(mixed)
    errors = {item[1:] for item in found(report) if item[0] == "error"}
    assert errors == {
        ("imagesTr/hippocampus_001.nii.gz", "fake-file"),
        ("imagesTr/hippocampus_004.nii.gz", "truncated"),
        ("imagesTr/hippocampus_006.nii.gz", "not-finite"),
        ("labelsTr/hippocampus_006.nii.gz", "shape-mismatch"),
        ("labelsTr/hippocampus_008.nii.gz", "shape-mismatch"),
        ("labelsTr/hippocampus_118.nii.gz", "missing-label"),
        ("imagesTr/hippocampus_010.nii.gz", "missing-channel"),
        ("imagesTr/hippocampus_281.nii.gz", "missing-channel"),
    }
    assert "(512, 512, 94)" in message(report, "shape-mismatch") or any(
        "(512, 512, 94)" in problem.message for problem in report.errors
    )
