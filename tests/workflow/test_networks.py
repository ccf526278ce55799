"""Every network trains, predicts and is evaluated by the same commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from segmamba import workflow
from segmamba.cli import main
from segmamba.config import PEER_NAMES
from segmamba.errors import ConfigError
from segmamba.inference.load import load_model
from segmamba.nn import footprint

SMALL = {
    "unet": {"dims": [4, 6, 8]},
    "resenc": {"dims": [4, 6, 8], "depths": [1, 1, 1]},
    "uxnet": {"dims": [4, 6], "hidden_size": 8},
    "segresnet": {"base_channels": 8, "depths": [1, 1, 1, 1]},
    "unetr": {"base_channels": 4, "hidden_size": 12},
    "swinunetr": {"base_channels": 12, "depths": [1, 1, 1, 1]},
    "swinunetr-v2": {"base_channels": 12, "depths": [1, 1, 1, 1]},
    "mednext": {"base_channels": 4, "depths": [1, 1, 1, 1, 1]},
}
PATCHES = {
    "unetr": [32, 32, 16],
    "mednext": [32, 16, 16],
    "swinunetr": [64, 32, 32],
    "swinunetr-v2": [64, 32, 32],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEER_NAMES)
def test_the_same_commands_for_every_network(
    name: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = project / "data", tmp_path / "run"
    settings = tmp_path / "settings.yaml"
    content = {
        "network": SMALL[name],
        "plan": {"patch_size": PATCHES.get(name, [16, 16, 16]), "batch_size": 1},
        "train": {"iterations_per_epoch": 1, "max_epochs": 1, "precision": "fp32"},
    }
    settings.write_text(yaml.safe_dump(content))
    options = ["--preset", name, "--config", str(settings), "--device", "cpu"]
    assert main(["train", str(data), "-o", str(run), *options]) == 0
    out = tmp_path / "predictions"
    scan = project / "scan.nii.gz"
    assert main(["predict", str(run), str(scan), "-o", str(out), "--no-mirror"]) == 0
    metrics = tmp_path / "metrics.json"
    reference = data / "labelsTr" / "case_0.nii.gz"
    arguments = [str(next(out.glob("*.nii.gz"))), str(reference), "-o", str(metrics)]
    assert main(["evaluate", *arguments]) == 0
    network = load_model(run, device="cpu").networks[0]
    assert network.config.name == name
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_is_named_before_any_scan_is_read(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    architectures = "dynamic_network_architectures.architectures.unet"
    monkeypatch.setitem(sys.modules, architectures, None)
    monkeypatch.setattr("segmamba.workflow.steps.measure", lambda *_: 1 / 0)
    footprint._measure.cache_clear()
    words = ["-o", str(tmp_path / "run"), "--preset", "unet", "--device", "cpu"]
    assert main(["train", str(project / "data"), *words]) == 1
    assert "pip install 'segmamba[nnunet]'" in capsys.readouterr().err


def test_settings_of_other_networks_are_refused(project: Path, tmp_path: Path) -> None:
    for network, word in (
        ({"d_state": 8}, "unknown key 'd_state'"),
        ({"hidden_size": 8}, "no setting 'hidden_size'"),
        ({"name": "unet"}, "not named in its own section"),
    ):
        with pytest.raises(ConfigError, match=word):
            workflow.plan(
                project / "data",
                tmp_path / "run",
                preset="unet",
                device="cpu",
                config=workflow.RunSettings(network=network),
            )
