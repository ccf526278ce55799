"""What goes wrong outside of the data: one text, no trace, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from segmamba import atomic, cli
from segmamba.checkpoint import load_checkpoint

COMMANDS = {
    "plan": ["plan", "data", "-o", "{}/run", "--device", "cpu"],
    "train": ["train", "data", "-o", "{}/run", "--config", "settings.yaml"],
    "predict": ["predict", "run", "scans", "-o", "{}/out", "--no-mirror"],
    "predict-file": [
        "predict",
        "run",
        "scan.nii.gz",
        "-o",
        "{}/a.nii.gz",
        "--no-mirror",
    ],
    "evaluate": ["evaluate", "predictions", "data", "-o", "{}/metrics.json"],
    "check": ["check", "data", "--json", "{}/problems.json"],
}


@pytest.fixture
def here(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The project as the current folder, with nothing shown so far."""
    monkeypatch.chdir(project)
    capsys.readouterr()
    return project


def fail(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and give its one error text."""
    assert cli.main(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    assert "unforeseen" not in shown
    return shown


def command(name: str, folder: Path) -> list[str]:
    return [word.format(folder) for word in COMMANDS[name]]


def files(folder: Path) -> list[str]:
    return sorted(str(item.relative_to(folder)) for item in folder.rglob("*"))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_output_that_takes_no_file(
    here: Path, tmp_path: Path, monkeypatch, capsys, name: str, number: int
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    shown = fail(command(name, tmp_path), capsys)
    assert os.strerror(number) in shown
    assert str(tmp_path) in shown
    assert not [item for item in tmp_path.rglob("*") if item.is_file()]


@pytest.mark.parametrize("name", [*COMMANDS])
def test_a_disk_that_fills_up_within_a_file(
    here: Path, tmp_path: Path, monkeypatch, capsys, name: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    shown = fail(command(name, tmp_path), capsys)
    assert "No space left on device" in shown
    assert str(tmp_path) in shown
    assert atomic.PREFIX not in shown
    assert not [item for item in tmp_path.rglob("*") if item.is_file()]


def test_a_disk_that_is_full_while_training(
    here: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(here / "run", tmp_path / "run", ignore=lambda *_: ["fold_0"])
    words = [*command("train", tmp_path), "--device", "cpu"]
    done: list[int] = []

    def full_later(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_later)
        shown = fail(words, capsys)
    assert "No space left on device" in shown
    assert "--resume" in shown
    assert not [name for name in files(tmp_path) if atomic.PREFIX in name]
    for path in (tmp_path / "run" / "fold_0").glob("*.safetensors"):
        load_checkpoint(path)  # whole
    assert cli.main([*words, "--resume"]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX rights")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_without_the_right_to_write(
    here: Path, tmp_path: Path, capsys, name: str
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        assert "denied" in fail(command(name, tmp_path), capsys)
    finally:
        tmp_path.chmod(0o700)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_below_a_file(here: Path, tmp_path: Path, capsys, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    shown = fail(command(name, tmp_path / "file"), capsys)
    assert str(tmp_path / "file") in shown
    assert files(tmp_path) == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["plan", "train", "predict"])
def test_a_gpu_that_is_not_there(here: Path, tmp_path: Path, capsys, name: str) -> None:
    shown = fail([*command(name, tmp_path), "--device", "cuda"], capsys)
    assert "'cuda' is not there" in shown
    assert "CUDA" in shown or "GPU" in shown
    assert "'cpu' or 'auto'" in shown
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_is_not_one(
    here: Path, tmp_path: Path, capsys, name: str
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command(name, tmp_path), "--fould", "1"])
    assert end.value.code == 2
    shown = "".join(capsys.readouterr())
    assert "--fould" in shown
    assert "Traceback" not in shown
    assert files(tmp_path) == []


@pytest.mark.parametrize("kind", ["empty", "missing", "file"])
@pytest.mark.parametrize("name", ["plan", "train", "predict", "evaluate", "check"])
def test_an_input_with_nothing_in_it(
    here: Path, tmp_path: Path, capsys, name: str, kind: str
) -> None:
    source = tmp_path / "input"
    if kind == "empty":
        source.mkdir()
    elif kind == "file":
        source.write_text("no scan")
    words = command(name, tmp_path)
    position = {"predict": 2}.get(name, 1)
    words[position] = str(source)
    assert str(source) in fail(words, capsys)
    assert not [file for file in files(tmp_path) if not file.startswith("input")]


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"\x80\x04\x95pickle", b"\xff" * 64]
)
def test_a_checkpoint_that_is_not_one(
    here: Path, tmp_path: Path, capsys, content: bytes
) -> None:
    shutil.copytree(here / "run", tmp_path / "run")
    fold = tmp_path / "run" / "fold_0"
    for path in fold.glob("*.safetensors"):
        path.write_bytes(content)
    before = files(tmp_path / "run")
    predict = ["predict", str(tmp_path / "run"), "scans", "-o", str(tmp_path / "out")]
    shown = fail(predict, capsys)
    assert "can't read a checkpoint: expected a whole safetensors file" in shown
    assert str(fold / "model.safetensors") in shown
    shown = fail(["info", str(tmp_path / "run")], capsys)
    assert str(fold / "model.safetensors") in shown
    train = [*command("train", tmp_path), "--device", "cpu", "--resume"]
    shown = fail(train, capsys)
    assert str(fold / "checkpoint") in shown
    assert files(tmp_path / "run") == before
    assert not (tmp_path / "out").exists()
