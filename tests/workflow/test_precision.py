"""The precision of a prediction is the user's to choose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segmamba import cli
from segmamba.devices import precision_for, resolve_device
from segmamba.io import read_volume


def predict(project: Path, output: Path, *options: str) -> np.ndarray:
    words = [str(project / "run"), str(project / "scan.nii.gz"), "-o", str(output)]
    assert (
        cli.main(["predict", *words, "--no-mirror", "--probabilities", *options]) == 0
    )
    return read_volume(output / "probabilities" / "scan.nii.gz").array


def recorded(output: Path) -> str:
    record = json.loads((output / "manifest.json").read_text())
    return record["cases"]["scan"]["precision"]


def test_the_precision_reaches_the_network(project: Path, tmp_path: Path) -> None:
    exact = predict(project, tmp_path / "fp32", "--precision", "fp32")
    rounded = predict(project, tmp_path / "bf16", "--precision", "bf16")
    assert recorded(tmp_path / "fp32") == "fp32"
    assert recorded(tmp_path / "bf16") == "bf16"
    difference = np.abs(exact - rounded).max()
    assert 1e-4 < difference < 0.1  # bfloat16 has 8 bits


def test_auto_is_what_the_device_does_best(project: Path, tmp_path: Path) -> None:
    predict(project, tmp_path)
    assert recorded(tmp_path) == precision_for(resolve_device("auto"))


def test_an_unknown_precision_is_refused(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(project / "run"), str(project / "scan.nii.gz"), "-o", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", *words, "--precision", "fp8"])
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert "fp8" in shown.err + shown.out
    assert list(tmp_path.iterdir()) == []
