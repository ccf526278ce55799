"""Folders of cases: reruns, broken cases, records."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segmamba.config import NetworkConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.errors import ConfigError
from segmamba.inference.cases import InputCase, predict_cases
from segmamba.inference.prediction import Prediction
from segmamba.inference.predictor import Predictor
from segmamba.inference.record import volumes_ml

SCHEME = LabelScheme({"background": 0, "bright": 1})


def make_predictor(network=None, **options) -> Predictor:
    plan = Plan(
        orientation="SPL",
        spacing_mm=(1.0, 1.0, 1.0),
        patch_size=(8, 8, 8),
        batch_size=1,
        normalization=(ChannelNormalization("none"),),
        network=NetworkConfig(),
    )
    settings = {"device": "cpu", "precision": "fp32", "mirror": False, **options}
    return Predictor(network or Bright(), plan, ["MRI"], SCHEME, **settings)


class Bright:
    """Class 1 where the image is above 5; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.cat([5 - batch, batch - 5], dim=1)


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 11, (6, 7, 8)).astype(np.int16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three good scans and a truncated one in the middle."""
    scans = tmp_path / "scans"
    scans.mkdir()
    for seed, name in enumerate(("a", "c", "d")):
        nib.save(nib.Nifti1Image(scan(seed), np.eye(4)), scans / f"{name}.nii.gz")
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    return scans


def test_a_broken_case_does_not_stop_the_others(folder, tmp_path):
    out = tmp_path / "out"
    steps = []
    summary = predict_cases(
        make_predictor(), folder, out, progress=lambda *step: steps.append(step)
    )
    assert summary.done == ("a", "c", "d")
    assert list(summary.failed) == ["b"]
    assert "b.nii.gz" in summary.failed["b"]
    written = sorted(path.name for path in out.iterdir())
    assert written == ["a.nii.gz", "c.nii.gz", "d.nii.gz", "manifest.json"]
    for seed, name in enumerate(("a", "c", "d")):
        label = np.asarray(nib.load(out / f"{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(label, scan(seed) > 5)
    assert steps[0] == (0, 4, "case a, window 1 of 1")
    assert [step for step in steps if step[2] == "d"] == [(4, 4, "d")]


def test_the_record_tells_all(folder, tmp_path):
    predictor = make_predictor(identity={"folds": ["0"], "weights": ["1f"]})
    predict_cases(predictor, folder, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert record["model"] == {"folds": ["0"], "weights": ["1f"], "files": []}
    assert record["options"] == {"overlap": 0.5, "mirror_axes": []}
    assert record["names"] == ["background", "bright"]
    assert record["wanted"] == {
        "probabilities": False,
        "uncertainty": False,
        "dicom": [],
    }
    assert {"segmamba", "torch"} <= set(record["versions"])
    assert [case["status"] for case in record["cases"].values()] == [
        "done",
        "failed",
        "done",
        "done",
    ]
    found = record["cases"]["a"]
    assert [row["path"] for row in found["inputs"]] == [str(folder / "a.nii.gz")]
    assert [row["path"] for row in found["outputs"]] == ["a.nii.gz"]
    assert found["seconds"] > 0
    assert found["shape"] == [6, 7, 8]
    assert found["volumes_ml"] == {"bright": np.count_nonzero(scan(0) > 5) / 1000}
    assert "b.nii.gz" in record["cases"]["b"]["error"]


def test_volumes_of_negative_integers():
    scheme = LabelScheme({"background": 0, "low": -2, "high": 1, "none": 9})
    label_map = np.array([-2, -2, 0, 1], np.int16).reshape(2, 2, 1)
    found = Prediction(label_map, np.diag([10.0, 10.0, 10.0, 1.0]))
    assert volumes_ml(found, scheme) == {"low": 2.0, "high": 1.0, "none": 0.0}


def test_a_rerun_does_only_what_is_missing(folder, tmp_path):
    out = tmp_path / "out"
    network = Bright()
    predict_cases(make_predictor(network), folder, out)
    assert network.calls == 3
    (out / "c.nii.gz").unlink()
    most = (out / "d.nii.gz").read_bytes()[:-3]
    (out / "d.nii.gz").write_bytes(most)  # as a power cut may leave it
    nib.save(nib.Nifti1Image(scan(9), np.eye(4)), folder / "b.nii.gz")  # repaired
    before = (out / "a.nii.gz").stat().st_mtime_ns
    summary = predict_cases(make_predictor(network), folder, out)
    assert (summary.done, summary.skipped) == (("b", "c", "d"), ("a",))
    assert network.calls == 6
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert set(summary.outputs) == {"a", "b", "c", "d"}
    record = json.loads((out / "manifest.json").read_text())
    assert {case["status"] for case in record["cases"].values()} == {"done"}
    again = predict_cases(make_predictor(network), folder, out, overwrite=True)
    assert len(again.done) == 4
    assert network.calls == 10


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_manifest_that_is_cut_off_is_begun_anew(folder, tmp_path, caplog, share):
    out = tmp_path / "out"
    predict_cases(make_predictor(), folder, out)
    whole = (out / "manifest.json").read_bytes()
    (out / "manifest.json").write_bytes(whole[: int(share * len(whole))])
    assert predict_cases(make_predictor(), folder, out).skipped == ("a", "c", "d")
    assert "manifest.json" in caplog.text
    record = json.loads((out / "manifest.json").read_text())
    assert sorted(record["cases"]) == ["a", "b", "c", "d"]


def test_a_scan_of_another_size_is_predicted_anew(folder, tmp_path):
    out = tmp_path / "out"
    predict_cases(make_predictor(), folder, out)
    nib.save(nib.Nifti1Image(scan(0)[:5], np.eye(4)), folder / "a.nii.gz")
    assert predict_cases(make_predictor(), folder, out).done == ("a",)


def test_another_models_folder_is_not_mixed_into(folder, tmp_path):
    out = tmp_path / "out"
    predict_cases(make_predictor(identity={"weights": ["1"]}), folder, out)
    other = make_predictor(identity={"weights": ["2"]})
    with pytest.raises(ConfigError, match="another model or other options"):
        predict_cases(other, folder, out)
    same_but_options = make_predictor(identity={"weights": ["1"]}, overlap=0.25)
    with pytest.raises(ConfigError, match=r"overlap.*0\.25"):
        predict_cases(same_but_options, folder, out)
    assert len(predict_cases(other, folder, out, overwrite=True).done) == 3


def test_probabilities_lie_apart(folder, tmp_path):
    out = tmp_path / "out"
    predict_cases(make_predictor(), folder, out)
    summary = predict_cases(make_predictor(), folder, out, probabilities=True)
    assert summary.done == ("a", "c", "d")  # they were missing
    maps = nib.load(out / "probabilities" / "a.nii.gz")
    assert maps.shape == (6, 7, 8, 2)
    np.testing.assert_array_equal(maps.get_fdata()[..., 1] > 0.5, scan(0) > 5)
    third = predict_cases(make_predictor(), folder, out, probabilities=True)
    assert third.skipped == ("a", "c", "d")


def test_uncertainty_lies_apart_and_is_recorded(folder, tmp_path):
    out, kinds = tmp_path / "out", ("entropy", "mutual_information", "confidence")
    summary = predict_cases(make_predictor(), folder, out, uncertainty=True)
    assert summary.done == ("a", "c", "d")
    for kind in kinds:
        assert nib.load(out / kind / "a.nii.gz").shape == (6, 7, 8)
    record = json.loads((out / "manifest.json").read_text())
    found = record["cases"]["a"]
    names = [row["path"] for row in found["outputs"]]
    assert names == ["a.nii.gz", *(f"{kind}/a.nii.gz" for kind in kinds)]
    row = found["uncertainty"]["structures"]["bright"]
    assert row["volume_ml"] == pytest.approx(found["volumes_ml"]["bright"])
    again = predict_cases(make_predictor(), folder, out, uncertainty=True)
    assert again.skipped == ("a", "c", "d")
    (out / "entropy" / "c.nii.gz").unlink()
    assert predict_cases(make_predictor(), folder, out, uncertainty=True).done == ("c",)
    file = tmp_path / "label.nii.gz"
    predict_cases(make_predictor(), folder / "a.nii.gz", file, uncertainty=True)
    assert (tmp_path / "label_mutual_information.nii.gz").is_file()


def test_one_file_for_one_case(folder, tmp_path):
    file = tmp_path / "deep" / "label.nii.gz"
    summary = predict_cases(
        make_predictor(), folder / "c.nii.gz", file, probabilities=True
    )
    assert summary.outputs == {"c": file}
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "label.nii.gz",
        "label_manifest.json",
        "label_probabilities.nii.gz",
    ]
    with pytest.raises(ConfigError, match="there already"):
        predict_cases(make_predictor(), folder / "c.nii.gz", file)
    with pytest.raises(ConfigError, match="several cases"):
        predict_cases(make_predictor(), folder, tmp_path / "x.nii.gz")


def test_unforeseen_errors_are_reported_too(folder, tmp_path, caplog):
    def broken(batch: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by chance")

    summary = predict_cases(make_predictor(broken), folder, tmp_path / "out")
    assert len(summary.failed) == 4
    assert summary.failed["a"] == "ZeroDivisionError: by chance"
    assert "case a failed" in caplog.text


def test_problems_found_beforehand_are_reported(folder, tmp_path):
    good = InputCase("a", (folder / "a.nii.gz",))
    bad = InputCase("x", (), "case x lacks a channel.")
    summary = predict_cases(make_predictor(), [good, bad], tmp_path / "out")
    assert summary.done == ("a",)
    assert summary.failed == {"x": "case x lacks a channel."}


def test_one_name_for_two_scans(folder, tmp_path):
    nib.save(nib.Nifti1Image(scan(0), np.eye(4)), folder / "a.nii")
    with pytest.raises(ConfigError, match=r"one file: found a\.nii\.gz"):
        predict_cases(make_predictor(), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="can't write to this folder"):
        predict_cases(make_predictor(), folder, tmp_path / "file")
