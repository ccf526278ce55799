"""What goes wrong outside of the data: one text, no trace, nothing half-written."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import segmamba
from segmamba import atomic, cli, workflow
from segmamba.checkpoint import load_checkpoint, load_model_metadata
from segmamba.console import ProgressDisplay
from segmamba.data.cache import build_cache, open_cache
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import Plan, load_plan
from segmamba.evaluation import evaluate
from segmamba.inference.find import find_cases
from segmamba.lock import folder_lock
from segmamba.workflow import steps

SOURCE = Path(segmamba.__file__).parent
GONE = "found No such file or directory"
DATES = ("io/dicom_rtstruct.py", "io/dicom_seg.py")

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

    monkeypatch.setattr(Path, "touch", refuse)
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


def vanish(patch: pytest.MonkeyPatch, stage: str, path: Path, kept: Path) -> None:
    """Let a file vanish to another place once a stage of a command is over."""
    before = ProgressDisplay.__call__

    def call(self, done: int, total: int, what: str, note: str = "") -> None:
        before(self, done, total, what, note)
        if (what, done) == (stage, total) and path.exists():
            path.rename(kept)

    patch.setattr(ProgressDisplay, "__call__", call)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("checking", "data/imagesTr/case_4.nii.gz"),
        ("measuring", "data/labelsTr/case_4.nii.gz"),
        ("preprocessing", "run/cache/case_4.image.npy"),
    ],
)
def test_an_input_that_vanishes_while_training(
    here: Path, tmp_path: Path, monkeypatch, capsys, stage: str, name: str
) -> None:
    shutil.copytree(here / "data", tmp_path / "data")
    words = ["train", str(tmp_path / "data"), "-o", str(tmp_path / "run")]
    words += ["--config", str(here / "settings.yaml"), "--device", "cpu"]
    path, kept = tmp_path / name, tmp_path / "kept"
    with monkeypatch.context() as patch:
        vanish(patch, stage, path, kept)
        shown = fail(words, capsys)
    assert str(path) in shown
    assert "No such file" in shown
    assert not [file for file in files(tmp_path) if "lock" in file or ".wri" in file]
    kept.rename(path)
    again = workflow.plan(tmp_path / "data", tmp_path / "run", device="cpu")
    assert again == workflow.plan(here / "data", tmp_path / "other", device="cpu")


def test_a_scan_that_vanishes_stops_no_other(
    here: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(here / "scans", tmp_path / "scans")
    words = ["predict", "run", str(tmp_path / "scans"), "-o", str(tmp_path / "out")]
    gone = tmp_path / "scans" / "case_5.nii.gz"
    found = find_cases(tmp_path / "scans", ["MRI"])
    gone.rename(tmp_path / "kept.nii.gz")
    shutil.copytree(here / "predictions", tmp_path / "out")
    (tmp_path / "out" / "case_5.nii.gz").unlink()
    monkeypatch.setattr(steps, "find_cases", lambda *_, **__: found)
    assert cli.main([*words, "--no-mirror"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert f"case_5: can't open a scan: expected a readable file, {GONE}" in shown
    assert str(gone) in shown
    assert len(list((tmp_path / "out").glob("case_*.nii.gz"))) == 5
    (tmp_path / "kept.nii.gz").rename(gone)
    assert cli.main([*words, "--no-mirror"]) == 0
    assert "1 predicted, 5 already there" in capsys.readouterr().out


def test_a_prediction_that_vanishes_while_scoring(
    here: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(here / "predictions", tmp_path / "predictions")
    real = evaluate.pair_files

    def pair_then_lose(*arguments, **options):
        pairing = real(*arguments, **options)
        pairing.pairs[3].prediction.unlink()
        return pairing

    monkeypatch.setattr(evaluate, "pair_files", pair_then_lose)
    scores = tmp_path / "metrics.json"
    words = ["evaluate", str(tmp_path / "predictions"), "data", "-o", str(scores)]
    shown = fail(words, capsys)
    assert GONE in shown
    assert "case_3.nii.gz" in shown
    assert not scores.exists()


@pytest.mark.parametrize(
    ("name", "work", "folder"),
    [("predict", "prediction", "out"), ("train", "training", "run/fold_0")],
)
def test_a_folder_that_another_run_writes_to(
    here: Path, tmp_path: Path, capsys, name: str, work: str, folder: str
) -> None:
    shutil.copytree(here / "run", tmp_path / "run", ignore=lambda *_: ["fold_0"])
    words = [*command(name, tmp_path), "--device", "cpu"]
    with folder_lock(tmp_path / folder, work):
        before = files(tmp_path)
        shown = fail(words, capsys)
        assert f"another {work} writes to this folder" in shown
        assert f"process {os.getpid()} on" in shown
        assert str(tmp_path / folder) in shown
        assert files(tmp_path) == before
    assert files(tmp_path / folder) == []


def test_runs_that_plan_and_cache_in_one_folder_at_once(
    here: Path, tmp_path: Path
) -> None:
    """Before the lock is taken, both write the same files, each whole."""
    data, run = here / "data", tmp_path / "run"

    def prepare(_: int) -> Plan:
        plan = workflow.plan(data, run, device="cpu")
        build_cache(load_dataset(data), plan, run / "cache", workers=1)
        return plan

    with ThreadPoolExecutor(3) as pool:
        plans = list(pool.map(prepare, range(3)))
    assert plans[0] == plans[1] == plans[2] == load_plan(run / "plan.json")
    cache = open_cache(run / "cache", plans[0])
    alone = build_cache(load_dataset(data), plans[0], tmp_path / "alone")
    for name in alone.case_ids:
        ours, theirs = cache.load(name), alone.load(name)
        assert np.array_equal(ours.image, theirs.image)
        assert np.array_equal(ours.label, theirs.label)
    assert not [name for name in files(run) if atomic.PREFIX in name]


def test_a_clock_that_jumps(here: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Time of day goes to and fro by decades; what is measured doesn't."""
    jumps = itertools.cycle((1e9, -1e9, 0.0))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    shutil.copytree(here / "run", tmp_path / "run", ignore=lambda *_: ["fold_0"])
    quick = "train:\n  iterations_per_epoch: 2\n  augmentation: {enabled: false}\n"
    (tmp_path / "quick.yaml").write_text(quick)
    words = ["train", "data", "-o", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--config", str(tmp_path / "quick.yaml"), "--max-epochs", "1"]
    assert cli.main(words) == 0
    metrics = json.loads((tmp_path / "run/fold_0/metrics.json").read_text())
    model = load_model_metadata(tmp_path / "run/fold_0/model.safetensors")
    assert model["finished"] is True
    assert metrics["summary"]
    log = (tmp_path / "run/fold_0/log.jsonl").read_text().splitlines()
    (seconds,) = [row["seconds"] for row in map(json.loads, log) if "loss" in row]
    assert 0 < seconds < 600
    assert not [name for name in files(tmp_path) if "lock" in name]


def test_nothing_but_a_record_reads_the_time_of_day() -> None:
    """Deadlines and durations come from clocks that don't jump."""
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(
            r"\btime\.time\(|\.now\(|utcnow|\.today\(", path.read_text("utf-8")
        )
    }
    # The age of leftovers and the date of a manifest or DICOM file.
    assert users <= {"atomic.py", "manifest.py", *DATES}, users


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
