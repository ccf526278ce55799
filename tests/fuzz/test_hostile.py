"""Hostile files run nothing, and nothing is written anywhere.

The bad inputs of the docs, and files that would do harm if anyone unpickled, unpacked
or believed them, are read while Python's audit events are watched.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
import torch
from bad_input import BadInput
from corpus import GROUPS
from engine import LONGEST_S, deadline, lay_out, limits
from target import Target
from targets import make_targets
from watch import watching

from segmamba.checkpoint import load_checkpoint, load_model_file, load_published_file
from segmamba.data.cache import Cache
from segmamba.errors import CheckpointError, ConfigError, FormatError, SegMambaError
from segmamba.inference.load import load_model
from segmamba.io import list_series
from segmamba.strict import load_yaml

SOURCE = Path(__file__).parents[2] / "src"
KINDS = [item for group in GROUPS.values() for item in group]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("seeds"))


@pytest.mark.skipif(os.name == "nt", reason="makes links")
@pytest.mark.parametrize("item", KINDS, ids=lambda item: item.what)
def test_bad_inputs_run_and_write_nothing(tmp_path: Path, item: BadInput) -> None:
    path = item.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with watching() as seen, pytest.raises(SegMambaError):
        item.read(path)
    assert seen == []
    assert sorted(tmp_path.rglob("*")) == before


def test_the_watch_sees(tmp_path: Path, canary: Path) -> None:
    data = pickle.dumps(Touch(canary))
    with watching() as seen:
        pickle.loads(data).close()  # noqa: S301
        canary.unlink()
    assert [event for event, _ in seen] == ["pickle.find_class", "open", "os.remove"]


def pickles(canary: Path) -> dict[str, bytes]:
    """The same hostile pickle in every dress that a loader may fall for."""
    plain = pickle.dumps(Touch(canary))
    saved, legacy, array, archive = (io.BytesIO() for _ in range(4))
    torch.save({"a": Touch(canary)}, saved)
    torch.save({"a": Touch(canary)}, legacy, _use_new_zipfile_serialization=False)
    objects = np.array([Touch(canary)], dtype=object)
    np.save(array, objects, allow_pickle=True)
    np.savez(archive, **{"1": objects})  # pyright: ignore
    return {
        "pickle": plain,
        "torch": saved.getvalue(),
        "torch-legacy": legacy.getvalue(),
        "npy": array.getvalue(),
        "npz": archive.getvalue(),
    }


@pytest.mark.parametrize("dress", ["pickle", "torch", "torch-legacy", "npy", "npz"])
@pytest.mark.parametrize(
    "reader", ["checkpoint", "published", "run-model", "cache-image", "cache-label"]
)
def test_no_loader_unpickles(
    readers: dict[str, Target], tmp_path: Path, canary: Path, dress: str, reader: str
) -> None:
    target = readers[reader]
    path = lay_out(target, tmp_path)
    path.write_bytes(pickles(canary)[dress])
    with watching() as seen, pytest.raises(SegMambaError):
        target.read(path)
    assert seen == []
    assert not canary.exists()


def test_cached_locations_are_not_unpickled(
    readers: dict[str, Target], tmp_path: Path, canary: Path
) -> None:
    target = readers["cache-foreground"]
    path = lay_out(target, tmp_path)
    for dress, data in pickles(canary).items():
        path.write_bytes(data)
        with watching() as seen, pytest.raises(FormatError, match="cached case 'a'"):
            Cache(path.parent, ("a",)).load("a")
        assert (dress, seen) == (dress, [])
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {0}']",
        "!!python/object/apply:subprocess.Popen [['touch', '{0}']]",
        "!!python/object/new:pathlib.Path ['{0}']",
        "!!python/name:os.system",
        "!!python/module:os",
        '!!python/object/apply:eval [\'open("{0}", "w")\']',
        "train: {{a: !!python/object/apply:os.system ['touch {0}']}}",
        "? !!python/object/apply:os.system ['touch {0}']\n: 1",
    ],
)
def test_yaml_makes_no_objects(tmp_path: Path, canary: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text.format(canary))
    with watching() as seen, pytest.raises(ConfigError, match=r"settings\.yaml"):
        load_yaml(path)
    assert seen == []
    assert not canary.exists()


def bomb(levels: int, merged: bool) -> str:
    """Text of a few hundred bytes that stands for 9 ** levels values."""
    lines = ["a0: &a0 {x: 1}" if merged else "a0: &a0 [x]"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * 9)
        body = f"{{<<: [{many}]}}" if merged else f"[{many}]"
        lines.append(f"a{level}: &a{level} {body}")
    return "\n".join(lines)


@pytest.mark.parametrize("merged", [False, True])
def test_yaml_bombs_are_refused(tmp_path: Path, merged: bool) -> None:
    (tmp_path / "settings.yaml").write_text(bomb(30, merged))
    with (
        limits(256 << 20),
        deadline(LONGEST_S),
        pytest.raises(ConfigError, match=r"an alias \(\*\) in line"),
    ):
        load_yaml(tmp_path / "settings.yaml")


HUGE: tuple[dict[str, Any], ...] = (
    {"dims": (10**9, 10**9)},
    {"dims": (5000, 5000)},
    {"depths": (10**9, 10**9)},
    {"d_state": 10**9},
    {"expand": 10**9},
    {"d_conv": 10**9},
    {"base_channels": 10**8},
    {"conv_blocks": (10**9, 1)},
    {"strides": ((10**9,) * 3, (2, 2, 2))},
    {"dims": (4,) * 2000, "depths": (1,) * 2000},
    {"name": "unet", "dims": (5000, 5000), "depths": (9**9, 1)},
    {"name": "resenc", "dims": (8, 8), "depths": (10**9, 1)},
    {"name": "segresnet", "base_channels": 9**7},
    {"name": "swinunetr", "base_channels": 24 * 9**5},
    {"name": "mednext", "base_channels": 9**7},
)


@pytest.mark.parametrize("change", HUGE, ids=lambda change: " ".join(map(str, change)))
def test_a_model_can_not_ask_for_a_network_beyond_its_weights(
    readers: dict[str, Target], tmp_path: Path, change: dict[str, Any]
) -> None:
    target = readers["run-model"]
    path, (seed,) = lay_out(target, tmp_path), target.seeds
    parts = json.loads(seed.data)
    named = {"in_channels": 1, "out_channels": 3, **change}
    parts["head"]["network"] = (
        named if "name" in change else {**parts["head"]["network"], **change}
    )
    assert seed.pack is not None
    path.write_bytes(seed.pack(json.dumps(parts).encode()))
    if "name" in change:  # whose package takes seconds to import, once
        importlib.import_module("monai.networks.nets")
        importlib.import_module("dynamic_network_architectures.architectures.unet")
    with limits(512 << 20), deadline(LONGEST_S), pytest.raises(CheckpointError) as told:
        load_model(tmp_path, device="cpu")
    assert str(path) in str(told.value)


def test_a_sound_model_is_within_the_bound(
    readers: dict[str, Target], tmp_path: Path
) -> None:
    target = readers["run-model"]
    path = lay_out(target, tmp_path)
    path.write_bytes(target.seeds[0].valid())
    assert load_model(tmp_path, device="cpu").channels == documents.DATASET.channels


@pytest.mark.parametrize("size", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_claimed_size_takes_no_memory(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b'{"a": 1}')
    for read in (load_checkpoint, load_model_file):
        with limits(64 << 20), deadline(LONGEST_S), pytest.raises(CheckpointError):
            read(path)


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/b", "a\\b", "c:evil", "\0", ""]
)
def test_no_case_is_named_out_of_its_folder(tmp_path: Path, name: str) -> None:
    described = json.loads(documents.texts()[1].seeds[2].data)
    described["cases"][0]["id"] = name
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(described))
    with pytest.raises(FormatError, match="a case id can't be a file's name"):
        documents.load_dataset(path)


def test_a_zip_in_a_zip_is_left_alone(tmp_path: Path) -> None:
    """Archives are opened one level deep: a bomb of many levels stays small."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.dcm", bytes(128) + b"DICM" + bytes(1 << 20))
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())
    with watching() as seen, pytest.raises(FormatError, match="no DICOM series"):
        list_series(tmp_path / "study.zip")
    assert seen == []


def test_published_weights_come_back(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.arange(3.0)}}, tmp_path / "w.pt")
    found = load_published_file(tmp_path / "w.pt")
    assert torch.equal(found["module"]["a"], torch.arange(3.0))
    with pytest.raises(CheckpointError, match=r"No such file.*gone\.pt"):
        load_published_file(tmp_path / "gone.pt")


def calls() -> list[tuple[str, int, str, dict[str, Any]]]:
    """Every call in the package: file, line, dotted name, and constant keywords."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                words = {
                    word.arg: word.value.value
                    for word in node.keywords
                    if word.arg and isinstance(word.value, ast.Constant)
                }
                name = ast.unparse(node.func)
                found.append((path.name, node.lineno, name, words))
    return found


def test_files_are_loaded_as_data_only() -> None:
    """What ruff's rules for pickle, eval, YAML and archives don't see."""
    loads = {name: [] for name in ("np.load", "torch.load")}
    for file, line, name, words in calls():
        assert name.split(".")[-1] not in ("extractall", "unpack_archive"), (file, line)
        if name in loads:
            loads[name].append((file, line, words))
    assert len(loads["np.load"]) >= 3
    assert all(words.get("allow_pickle") is False for *_, words in loads["np.load"])
    assert len(loads["torch.load"]) >= 1
    assert all(words.get("weights_only") is True for *_, words in loads["torch.load"])
