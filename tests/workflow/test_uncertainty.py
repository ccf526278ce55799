"""Uncertainty from the command line: maps, manifest, calibration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmamba import cli


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data and run."""
    for name in ("data", "run"):
        shutil.copytree(project / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_predict_then_calibrate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "run", "data", "-o", "out", "--uncertainty"]
    assert cli.main(words) == 0
    evaluate = ["evaluate", "out", "data", "-o", "m.json"]
    assert cli.main([*evaluate, "--calibration", "reliability.png"]) == 0
    assert "Spearman of expected Dice" in capsys.readouterr().out
    assert (here / "reliability.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((here / "m.json").read_text())
    record = json.loads((here / "out" / "manifest.json").read_text())
    found = metrics["calibration"]
    assert set(found["scores"]["cases"]) == set(record["cases"])
    for name, row in found["scores"]["cases"].items():
        doubt = record["cases"][name]["uncertainty"]
        assert doubt["samples"] == 8
        assert row["expected_dice"] == doubt["expected_dice"]
        assert row["dice"] == metrics["cases"][name]["ball"]["dice"]
    right = total = 0
    for name in record["cases"]:
        label = here / "data" / "labelsTr" / f"{name}.nii.gz"
        maps = [
            nib.load(p).get_fdata() for p in (here / "out" / f"{name}.nii.gz", label)
        ]
        right += np.count_nonzero(maps[0] == maps[1])
        total += maps[0].size
    assert found["reliability"]["all"]["accuracy"] == pytest.approx(right / total)
    manifest = json.loads((here / "m_manifest.json").read_text())
    names = [Path(row["path"]).name for row in manifest["outputs"]]
    assert names == ["m.json", "reliability.png"]


def test_calibration_needs_uncertainty(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "run", "data", "-o", "out", "--no-mirror"]) == 0
    evaluate = ["evaluate", "out", "data", "-o", "m.json", "--calibration", "r.png"]
    capsys.readouterr()
    assert cli.main(evaluate) == 1
    assert "--uncertainty --overwrite" in capsys.readouterr().err
    assert not (here / "m.json").exists()


def test_snapshots_are_more_samples(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fold = here / "run" / "fold_0"
    words = ["predict", "run", "data/imagesTr/case_1.nii.gz", "--no-mirror"]
    assert cli.main([*words, "-o", "none", "--snapshots"]) == 1
    assert "train.snapshots" in capsys.readouterr().err
    for name in ("1", "2"):
        (fold / "snapshots" / name).mkdir(parents=True)
        shutil.copy(fold / "model.safetensors", fold / "snapshots" / name)
    assert cli.main([*words, "-o", "more", "--snapshots"]) == 0
    record = json.loads((here / "more" / "manifest.json").read_text())
    assert record["cases"]["case_1"]["uncertainty"]["samples"] == 3
    assert len(record["model"]["files"]) == 5
    assert cli.main([*words, "-o", "one", "--uncertainty"]) == 0
    more, one = (
        nib.load(here / name / "mutual_information" / "case_1.nii.gz").get_fdata()
        for name in ("more", "one")
    )
    np.testing.assert_allclose(more, one, atol=1e-3)  # copies have nothing to add


def test_a_whole_volume_is_recorded_and_near_the_windows(here: Path) -> None:
    words = ["predict", "run", "data", "--no-mirror", "-o"]
    assert cli.main([*words, "windows"]) == 0
    assert cli.main([*words, "whole", "--whole-volume"]) == 0
    record = json.loads((here / "whole" / "manifest.json").read_text())
    assert record["options"]["whole_volume"] is True
    assert cli.main(["evaluate", "whole", "windows", "-o", "m.json"]) == 0
    shares = json.loads((here / "m.json").read_text())["differing_voxels"]
    assert 0 < shares["largest"] < 0.2
