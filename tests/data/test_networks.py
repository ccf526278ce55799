"""Plans for the networks of other papers: patch, strides, sizes and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segmamba.config import PEER_NAMES, PeerConfig
from segmamba.data.dataset import Dataset
from segmamba.data.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from segmamba.data.labels import LabelScheme
from segmamba.data.memory import (
    count_weights,
    prediction_memory_mib,
    training_memory_mib,
)
from segmamba.data.plan import Plan, load_plan, make_plan, save_plan
from segmamba.data.planning import total_strides
from segmamba.errors import ConfigError
from segmamba.nn import preset_config

# Peak resident memory of one step (forward, loss, backward, SGD without momentum) and
# of a forward pass at 64^3, beyond the interpreter and its libraries; torch 2.13, one
# thread, float32, 4 channels in and 3 out; MiB.
MEASURED = {
    "unet": (722, 381),
    "resenc": (1440, 658),
    "uxnet": (1616, 706),
    "segresnet": (696, 292),
    "unetr": (1034, 558),
    "swinunetr": (2102, 756),
    "swinunetr-v2": (2166, 786),
    "mednext": (2235, 467),
}
CUBE = (64, 64, 64)
MR = ChannelFingerprint("T1", "other", 400, 80, 390, 0, 900, 50, 800, 0.0)


def plan_of(name, shape=(90, 100, 80), spacing=(1.0, 1.0, 1.0), **options) -> Plan:
    cases = tuple(
        CaseFingerprint(f"c{i}", shape, spacing, "RAS", shape, {"a": 5})
        for i in range(20)
    )
    fingerprint = Fingerprint("toy", cases, (MR,), shape, spacing, {"a": 5})
    scheme = LabelScheme({"background": 0, "a": 1, "b": 2})
    dataset = Dataset("toy", Path("toy"), "csv", ("T1",), scheme, ())
    return make_plan(fingerprint, dataset, network=preset_config(name), **options)


@pytest.mark.parametrize("name", PEER_NAMES)
def test_memory_within_thirty_per_cent(name):
    config = preset_config(name, in_channels=4, out_channels=3)
    training, prediction = MEASURED[name]
    states = 8 * count_weights(config) / 2**20  # momentum and average weren't there
    estimate = training_memory_mib(config, CUBE, 1) - states
    assert estimate == pytest.approx(training, rel=0.3)
    assert prediction_memory_mib(config, CUBE) == pytest.approx(prediction, rel=0.3)


# Peak of what PyTorch allocated on an H100, torch 2.11, bfloat16, 4 channels in and 4
# out at 128^3; a step of two patches without optimiser, and a forward pass of one; MiB.
MEASURED_ON_GPU = {
    "resenc": (5943, 1394),
    "swinunetr": (22283, 3830),
    "segresnet": (10421, 1298),
}


@pytest.mark.parametrize("name", MEASURED_ON_GPU)
def test_memory_on_a_gpu_just_above_what_was_measured(name):
    config = preset_config(name, in_channels=4, out_channels=4)
    training, prediction = MEASURED_ON_GPU[name]
    size = (128, 128, 128)
    # Momentum and average of the weights, and batches that wait.
    training += (8 * count_weights(config) + 5 * 2 * (4 * 4 + 2) * 128**3) / 2**20
    estimate = training_memory_mib(config, size, 2, "cuda")
    assert training <= estimate <= 1.15 * training
    estimate = prediction_memory_mib(config, size, "cuda")
    assert prediction <= estimate <= 1.15 * prediction


def test_memory_grows_with_voxels_and_halves_on_gpus():
    config = preset_config("uxnet")
    once, twice = (training_memory_mib(config, CUBE, batch) for batch in (1, 2))
    larger = training_memory_mib(config, (128, 64, 64), 1)
    assert larger == pytest.approx(twice)
    assert twice > 1.5 * once
    assert training_memory_mib(config, CUBE, 1, "cuda") < once


@pytest.mark.parametrize("name", PEER_NAMES)
def test_every_network_is_planned(name, tmp_path):
    plan = plan_of(name)
    network = plan.network
    assert isinstance(network, PeerConfig)
    assert (network.in_channels, network.out_channels) == (1, 3)
    totals = total_strides(network.strides)
    assert all(n % t == 0 for n, t in zip(plan.patch_size, totals, strict=True))
    assert 32**3 < plan.patch_size[0] * plan.patch_size[1] * plan.patch_size[2] <= 64**3
    assert plan.memory_training_mib > plan.memory_prediction_mib > 0
    if name == "unetr":
        assert network.patch_size == plan.patch_size
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json") == plan
    stored = json.loads((tmp_path / "plan.json").read_text())["network"]
    assert "d_state" not in stored


def test_nnunets_networks_follow_thick_slices():
    plan = plan_of("unet", shape=(320, 320, 30), spacing=(0.6, 0.6, 4.0))
    assert plan.network.strides[:2] == ((1, 2, 2), (1, 2, 2))
    assert len(plan.network.dims) == len(plan.network.strides) + 1
    assert len(plan.network.depths) == len(plan.network.dims)


def test_small_data_cut_the_deepest_stages():
    plan = plan_of("uxnet", shape=(35, 50, 36))
    assert plan.network.dims == (48, 96, 192)
    assert plan.network.hidden_size == 384
    assert plan_of("unet", shape=(35, 50, 36)).network.dims == (32, 64, 128, 256)
    assert plan_of("swinunetr", shape=(35, 50, 36)).patch_size == CUBE


def test_a_patch_of_ones_own_reaches_the_network():
    plan = plan_of("unetr", overrides={"patch_size": [40, 48, 20]})
    assert plan.patch_size == (40, 48, 20)
    assert plan.network.patch_size == (48, 48, 32)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("unet", {"dims": [8, 8]}, "entries"),
        ("unet", {"d_state": 8}, "unknown key 'd_state'"),
        ("unet", {"hidden_size": 8}, "which is fixed"),
        ("segresnet", {"strides": [[2, 2, 2]] * 2}, "which is fixed"),
        ("segresnet", {"deep_supervision": True}, "which is fixed"),
        ("swinunetr", {"base_channels": None}, "such as 48"),
        ("unetr", {"patch_size": [16, 16, 16]}, "patch_size is too large"),
        ("unetr", {"patch_size": [60, 60, 60]}, "multiples of 16"),
    ],
)
def test_bad_edits_of_a_plan_are_refused(name, change, word, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, plan_of(name))
    edited = json.loads(path.read_text())
    edited["network"].update(change)
    path.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=word) as error:
        load_plan(path)
    assert "plan.json" in str(error.value)
