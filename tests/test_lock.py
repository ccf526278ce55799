"""Two trainings or predictions never share a folder; a dead one blocks nobody."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segmamba.errors import ConfigError
from segmamba.lock import folder_lock

HOLD = """
import sys, pathlib, time
from segmamba.lock import folder_lock
with folder_lock(pathlib.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal 9")
def test_the_second_is_refused_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with (
            pytest.raises(ConfigError, match=f"process {holder.pid} on "),
            folder_lock(tmp_path, "training"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / "training.lock").exists()
    with folder_lock(tmp_path, "training"):
        owner = json.loads((tmp_path / "training.lock").read_text())
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / "training.lock").exists()


def test_no_lock_is_left_after_an_error(tmp_path):
    with (
        pytest.raises(RuntimeError, match="stop"),
        folder_lock(tmp_path / "run", "training"),
    ):
        raise RuntimeError("stop")
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_process_is_refused_too(tmp_path):
    with (
        folder_lock(tmp_path, "training"),
        pytest.raises(ConfigError, match="another training"),
        folder_lock(tmp_path, "training"),
    ):
        pass


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ConfigError, match="can't write to this folder"),
        folder_lock(tmp_path / "run", "training"),
    ):
        pass


def test_a_full_disk_neither_breaks_the_lock_nor_leaves_it(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        folder_lock(tmp_path, "training"),
        pytest.raises(ConfigError, match="found another process"),
        folder_lock(tmp_path, "training"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_had_half_written_is_removed(tmp_path, monkeypatch):
    for name in (".writing-a.npy", "whole.npy"):
        (tmp_path / name).write_bytes(b"x")
    with folder_lock(tmp_path, "training"):
        (tmp_path / ".writing-b").write_bytes(b"x")  # our own, from now on
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".writing-b",
        "whole.npy",
    ]
    monkeypatch.setattr("segmamba.lock._lock", lambda _: False)  # it may be another's
    with folder_lock(tmp_path, "training"):
        assert (tmp_path / ".writing-b").exists()


def test_a_lock_that_another_tries_just_now_ends_well(tmp_path, monkeypatch):
    """As on Windows, where a file that is open elsewhere can't be removed."""

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "in use")

    with folder_lock(tmp_path, "training"):
        monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.undo()
    with folder_lock(tmp_path, "training"):
        pass
    assert not list(tmp_path.iterdir())
