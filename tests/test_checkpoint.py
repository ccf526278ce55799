"""Checkpoints: what goes in comes out, and what is broken says so."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from segmamba import checkpoint
from segmamba.checkpoint import (
    load_checkpoint,
    load_latest_checkpoint,
    load_model_file,
    load_model_metadata,
    previous_path,
    save_checkpoint,
    save_model,
    update_model,
)
from segmamba.config import NetworkConfig
from segmamba.errors import CheckpointError

TENSORS = {
    "network.weight": torch.arange(24.0).reshape(2, 3, 4),
    "ema.weight": torch.tensor([float("nan"), float("inf"), -0.0]),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 5),
}
METADATA = {"step": 3, "rate": 0.1 + 0.2, "name": "é", "nested": {"list": [1, None]}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, TENSORS, METADATA)
    return path


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [item.reshape(-1).view(torch.uint8) for item in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("copy", [True, False])
def test_everything_comes_back_bit_for_bit(file, copy):
    tensors, metadata = load_checkpoint(file, copy=copy)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(equal_bits(tensors[name], TENSORS[name]) for name in TENSORS)


def test_other_programs_can_read_the_tensors(file):
    assert torch.equal(load_file(file)["network.weight"], TENSORS["network.weight"])


def test_views_and_shared_memory_are_stored_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"a": base, "b": base, "row": base[1], "turned": base.T}
    save_checkpoint(tmp_path / "c.safetensors", views, {})
    tensors, _ = load_checkpoint(tmp_path / "c.safetensors")
    assert all(torch.equal(tensors[name], views[name]) for name in views)
    assert (tmp_path / "c.safetensors").stat().st_size < 1000


def test_one_generation_is_kept(file):
    save_checkpoint(file, TENSORS, {"step": 4}, keep_previous=True)
    save_checkpoint(file, TENSORS, {"step": 5}, keep_previous=True)
    assert load_checkpoint(file)[1] == {"step": 5}
    assert load_checkpoint(previous_path(file))[1] == {"step": 4}
    assert sorted(item.name for item in file.parent.iterdir()) == [
        "checkpoint-previous.safetensors",
        "checkpoint.safetensors",
    ]


@pytest.mark.parametrize("length", [0, 4, 8, 100, 400, -1])
def test_a_truncated_file_is_refused_and_the_one_before_is_used(file, length):
    save_checkpoint(file, TENSORS, {"step": 4}, keep_previous=True)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="can't read a checkpoint"):
        load_checkpoint(file)
    loaded = load_latest_checkpoint(file)
    assert loaded is not None
    assert loaded.metadata == METADATA
    assert loaded.path == previous_path(file)
    assert loaded.note is not None
    assert "checkpoint before the last" in loaded.note


def test_a_kill_between_the_two_renames_loses_nothing(file):
    file.replace(previous_path(file))
    loaded = load_latest_checkpoint(file)
    assert loaded is not None
    assert loaded.metadata == METADATA


def test_a_flipped_bit_is_noticed(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(file)


def test_nothing_there_is_none_and_a_missing_name_is_an_error(tmp_path):
    assert load_latest_checkpoint(tmp_path / "checkpoint.safetensors") is None
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.safetensors")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="another program"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors"):
        load_checkpoint(path)
    header = json.dumps({"__metadata__": {"segmamba": "[1"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="another program"):
        load_checkpoint(path)


def test_a_newer_format_names_the_remedy(file, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="Install the version that wrote it"):
        load_checkpoint(file)


@pytest.mark.parametrize("where", ["save_file", "flush_file"])
def test_a_full_disk_leaves_what_was_there(file, monkeypatch, where):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(file, TENSORS, {"step": 9}, keep_previous=True)
    assert load_checkpoint(file)[1] == METADATA
    assert [item.name for item in file.parent.iterdir()] == [file.name]


def test_a_model_file_knows_its_network(tmp_path):
    path = tmp_path / "model.safetensors"
    network = NetworkConfig(in_channels=4, out_channels=3, dims=(8, 16, 24, 32))
    save_model(path, TENSORS, network=network, metadata={"plan_hash": "abc", "step": 9})
    model = load_model_file(path)
    assert model.network == network
    assert model.metadata["plan_hash"] == "abc"
    assert model.metadata["versions"]["torch"] == torch.__version__
    assert torch.equal(model.tensors["half"], TENSORS["half"])


def test_metadata_of_a_model_change_and_its_weights_stay(tmp_path):
    path = tmp_path / "model.safetensors"
    network = NetworkConfig(in_channels=1, out_channels=2)
    save_model(path, TENSORS, network=network, metadata={"finished": False, "step": 9})
    assert load_model_metadata(path) == load_model_file(path).metadata
    before = load_model_metadata(path)
    update_model(path, finished=True)
    model = load_model_file(path)
    assert model.metadata == {**before, "finished": True}
    assert model.network == network
    assert all(equal_bits(model.tensors[name], TENSORS[name]) for name in TENSORS)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "read",
    [load_model_file, load_model_metadata, update_model],
    ids=lambda f: f.__name__,
)
def test_a_training_state_is_no_model(file, read):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(file)


def test_an_unknown_network_setting_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {}, {"kind": "model", "network": {"dimms": [1]}})
    with pytest.raises(CheckpointError, match="unknown key 'dimms'"):
        load_model_file(path)
