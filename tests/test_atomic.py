"""Files are written whole or not at all, whoever writes them and whatever fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from segmamba import atomic
from segmamba.atomic import atomic_path, read_json, write_json, write_text
from segmamba.checkpoint import load_checkpoint, save_checkpoint
from segmamba.errors import FormatError
from segmamba.io import SCAN_SUFFIXES, Volume, write_volume

NOISE = np.random.default_rng(0).integers(0, 255, (1, 40, 40, 40)).astype(np.uint8)


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let the system refuse files of more bytes than this, as a full disk does.

    A real refusal, in the middle of a write, by whatever library writes.
    """
    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def scan(suffix: str) -> tuple[str, Callable[[Path], None]]:
    return f"x{suffix}", lambda path: write_volume(path, Volume(NOISE, np.eye(4)))


def array(path: Path) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, NOISE)


WRITERS: dict[str, Callable[[Path], None]] = {
    "x.json": lambda path: write_json(path, NOISE.ravel()[:9999]),
    "x.txt": lambda path: write_text(path, "é" * 9999),
    "x.npy": array,
    "x.safetensors": lambda path: save_checkpoint(
        path, {"a": torch.arange(9999.0)}, {"step": 1}, keep_previous=True
    ),
    **dict(scan(suffix) for suffix in SCAN_SUFFIXES),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("room", [0, 100, 4096])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_keeps_what_was_there(
    tmp_path: Path, name: str, room: int
) -> None:
    write, path = WRITERS[name], tmp_path / name
    with full_disk(room), pytest.raises(Exception, match=r"too large|short") as told:
        write(path)
    assert str(path.with_suffix("")) in str(told.value)
    assert contents(tmp_path) == {}
    write(path)
    before = contents(tmp_path)
    assert max(map(len, before.values())) > room
    with full_disk(room), pytest.raises(Exception, match=r"too large|short"):
        write(path)
    assert contents(tmp_path) == before


def test_an_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == {}


def test_readers_see_one_whole_file_or_the_other(tmp_path: Path) -> None:
    """Two write and one reads, all at once."""
    path = tmp_path / "x.json"
    texts = [{"value": [number] * 2000} for number in range(2)]
    write_json(path, texts[0])
    stop = threading.Event()

    def write(data: object) -> None:
        while not stop.is_set():
            write_json(path, data)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    seen = [read_json(path) for _ in range(60)]
    stop.set()
    for writer in writers:
        writer.join()
    assert all(data in texts for data in seen)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_the_error_names_the_file_that_was_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as told:
        write_text(tmp_path / "x.txt", "text")
    assert told.value.filename == str(tmp_path / "x.txt")
    assert atomic.PREFIX not in str(told.value)


def test_checkpoints_of_a_full_disk_go_on_from_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.ones(9)}, {"step": 1})
    with full_disk(100), pytest.raises(Exception, match=r"too large|short"):
        save_checkpoint(path, {"a": torch.ones(9999)}, {"step": 2}, keep_previous=True)
    assert load_checkpoint(path)[1] == {"step": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        ('{"a": NaN}', "NaN, which is no JSON"),
        ("[-Infinity]", "-Infinity, which is no JSON"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion|nested"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_json_that_says_two_things_or_nothing(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match=rf"(?s){says}.*x\.json"):
        read_json(tmp_path / "x.json")


def test_what_json_can_not_say_becomes_null(tmp_path: Path) -> None:
    data = {"a": float("nan"), 1: np.float32(2.5), "p": tmp_path, "n": np.arange(2)}
    write_json(tmp_path / "x.json", data)
    text = (tmp_path / "x.json").read_text()
    expected = {"a": None, "1": 2.5, "p": str(tmp_path), "n": [0, 1]}
    assert json.loads(text) == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_are_as_open_as_the_umask_says_which_nobody_changes(
    tmp_path: Path, monkeypatch
) -> None:
    def changed(mask: int) -> int:
        raise AssertionError("threads that do this at once leave a umask of 0")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", changed)
            write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
