"""A memory that is too small is an answer, not a crash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from segmamba import cli
from segmamba.nn.segmamba import SegMamba


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that ask for 400 TB, which the system refuses at once."""
    monkeypatch.setattr(SegMamba, "forward", lambda *_: torch.empty(10**14))


def test_training_says_what_was_tried_and_what_to_lower(
    project: Path, tmp_path: Path, greedy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(project / "data"), "-o", str(tmp_path / "run"), "--device", "cpu"]
    config = ["--config", str(project / "settings.yaml")]
    assert cli.main(["train", *words, *config]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: memory is too small for this training: found ")
    assert "381469726.6 MiB" in shown
    assert "patches of 16 x 16 x 16 voxels and a batch of 2 should take" in shown
    plan = tmp_path / "run" / "plan.json"
    assert f"Lower batch_size from 2 to 1 in {plan} (then 15" in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.rglob(".writing-*"))


def test_the_plan_can_be_lowered_and_training_goes_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(project / "data"), "-o", str(tmp_path / "run")]
    words += ["--device", "cpu", "--config", str(project / "settings.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(SegMamba, "forward", lambda *_: torch.empty(10**14))
        assert cli.main(words) == 1
    plan = tmp_path / "run" / "plan.json"
    plan.write_text(plan.read_text().replace('"batch_size": 2', '"batch_size": 1'))
    assert cli.main([*words, "--max-epochs", "1"]) == 0


def test_prediction_names_each_case_and_writes_nothing(
    project: Path, tmp_path: Path, greedy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(project / "scans", tmp_path / "scans")
    words = [str(project / "run"), str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    assert cli.main(["predict", *words, "--device", "cpu"]) == 1
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("error: ")]
    assert len(shown) == 6
    assert "going on with 1 windows" in lines[0]
    assert all("cpu has too little memory for case case_" in line for line in shown)
    assert "381469726.6 MiB" in shown[0]
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_memory_that_runs_out_elsewhere_is_told_too(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("segmamba.workflow.fold.build_cache", refuse)
    words = [str(project / "data"), "-o", str(tmp_path / "run"), "--device", "cpu"]
    config = ["--config", str(project / "settings.yaml")]
    assert cli.main(["train", *words, *config]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: memory ran out: found no more memory.")
    assert "Traceback" not in shown
