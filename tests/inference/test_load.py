"""Runs from their folders: which folds, and what doesn't fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from segmamba.atomic import write_json, write_text
from segmamba.checkpoint import load_model_file, save_checkpoint, save_model
from segmamba.data.dataset import Dataset, dataset_to_dict
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan, plan_hash, save_plan
from segmamba.errors import CheckpointError, FormatError
from segmamba.inference import sliding_window_logits
from segmamba.inference.load import load_model, trained_folds
from segmamba.nn import create_network

PLAN = Plan(
    orientation="SPL",
    spacing_mm=(1.0, 1.0, 1.0),
    patch_size=(24, 24, 24),
    batch_size=1,
    normalization=(ChannelNormalization("zscore"),),
    network=create_network(
        "segmamba-light",
        in_channels=1,
        out_channels=3,
        dims=(4, 8),
        hidden_size=8,
        depths=(1, 1),
        strides=(2, 2),
    ).config,
)
SCHEME = LabelScheme({"background": 0, "anterior": 1, "posterior": 2})


def save_fold(run: Path, name: str, seed: int = 0, **metadata) -> Path:
    """Write random weights as training would."""
    torch.manual_seed(seed)
    network = create_network_of_plan()
    path = run / f"fold_{name}" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"plan_hash": plan_hash(PLAN), "step": 100}
    save_model(
        path,
        network.state_dict(),
        network=PLAN.network,
        metadata={**known, **metadata},
    )
    return path


def create_network_of_plan() -> torch.nn.Module:
    from segmamba.nn import build_network

    return build_network(PLAN.network).eval()


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_plan(folder / "plan.json", PLAN)
    dataset = Dataset("hippocampus", tmp_path, "msd", ("MRI",), SCHEME, ())
    write_json(folder / "dataset.json", dataset_to_dict(dataset))
    return folder


def scan() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(27, 19, 24)).astype(np.float32)


def test_weights_come_back(run):
    save_fold(run, "0", seed=5)
    predictor = load_model(run, device="cpu", precision="fp32", mirror=False)
    torch.manual_seed(5)
    expected = create_network_of_plan()
    x = torch.randn(1, 1, 24, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(predictor.networks[0](x), expected(x))
    assert predictor.channels == ("MRI",)
    assert predictor.names == ("background", "anterior", "posterior")
    prediction = predictor.predict(scan(), affine=np.eye(4), probabilities=True)
    assert prediction.label_map.shape == (27, 19, 24)
    assert set(np.unique(prediction.label_map)) <= {0, 1, 2}


def test_one_slice_of_one_channel_in_bfloat16(run):
    save_fold(run, "0")
    (network,) = load_model(run, "cpu", precision="bf16").networks
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv3d))
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(1, 1, 1, 24, 40)
        with torch.inference_mode():
            expected = first(x)
            for size in 960, 3840, 15360, 61440:  # what lies where it must not read
                torch.full((size,), torch.nan, dtype=torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                found = first(x).float()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_weights_of_another_type_become_the_networks_own(run):
    path = save_fold(run, "0")
    file = load_model_file(path)
    halves = {name: tensor.half() for name, tensor in file.tensors.items()}
    save_model(path, halves, network=file.network, metadata=file.metadata)
    (network,) = load_model(run, "cpu").networks
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == file.tensors[name].dtype
        assert torch.equal(tensor, halves[name].to(tensor.dtype))


def test_folds_are_chosen(run):
    for name in ("1", "0", "10", "all"):
        save_fold(run, name, seed=len(name))
    assert [fold.name for fold in trained_folds(run)] == ["0", "1", "10", "all"]
    for folds, expected in {
        None: ["0", "1", "10"],
        1: ["1"],
        "all": ["all"],
        ("10", "fold_0"): ["10", "0"],
    }.items():
        predictor = load_model(run, "cpu", folds)
        assert predictor.identity["folds"] == expected
        assert len(predictor.networks) == len(expected)
    assert load_model(run / "fold_1", "cpu").identity["folds"] == ["1"]
    with pytest.raises(CheckpointError, match=r"fold 3 is not trained.*0, 1, 10, all"):
        load_model(run, "cpu", (0, 3))


def test_all_is_taken_where_it_is_alone(run):
    save_fold(run, "all")
    assert load_model(run, "cpu").identity["folds"] == ["all"]


def test_half_trained_folds_are_left_out_and_named(run, caplog):
    save_fold(run, "0", finished=False)
    save_fold(run, "1", finished=True)
    save_fold(run, "2", finished=True)
    assert load_model(run, "cpu").identity["folds"] == ["1", "2"]
    assert caplog.messages == ["left out, as their training is not over: fold_0"]


@pytest.mark.parametrize("folds", [None, 0, (0, 1)])
def test_a_half_trained_fold_counts_if_it_is_named_or_alone(run, caplog, folds):
    save_fold(run, "0", finished=False, step=70)
    if folds == (0, 1):
        save_fold(run, "1", finished=True)
    identity = load_model(run, "cpu", folds).identity
    assert identity["finished"] == ([False, True] if folds == (0, 1) else [False])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("fold_0 is half-trained (step 70)")


def test_several_half_trained_folds_are_no_ensemble(run):
    save_fold(run, "0", finished=False)
    save_fold(run, "1", finished=False)
    with pytest.raises(CheckpointError, match=r"no fold's training is over.*--resume"):
        load_model(run, "cpu")
    save_fold(run, "all", finished=True)
    assert load_model(run, "cpu").identity["folds"] == ["all"]


def test_folds_are_averaged(run):
    save_fold(run, "0", seed=1)
    save_fold(run, "1", seed=2)
    models = [load_model(run, "cpu", folds) for folds in (0, 1, None)]
    image = torch.from_numpy(scan()[None])
    logits = [
        sliding_window_logits(
            model.networks, image, model.plan.patch_size, precision="fp32"
        )
        for model in models
    ]
    torch.testing.assert_close(
        logits[2], (logits[0] + logits[1]) / 2, atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(logits[0], logits[1])


def test_identity_tells_trainings_apart(run):
    save_fold(run, "0", seed=1)
    first = load_model(run, "cpu").identity
    assert first == load_model(run, "cpu").identity
    save_fold(run, "0", seed=2)
    assert load_model(run, "cpu").identity["weights"] != first["weights"]


def test_only_trained_mirrorings_are_used(run):
    save_fold(run, "0")
    assert load_model(run, "cpu").mirror_axes == (0, 1, 2)
    config = run / "fold_0" / "config.yaml"
    write_text(config, "augmentation:\n  enabled: true\n  mirror_axes: [0, 1]\n")
    assert load_model(run, "cpu").mirror_axes == (0, 1)
    assert load_model(run, "cpu", mirror=False).mirror_axes == ()
    assert load_model(run, "cpu", mirror=(2,)).mirror_axes == (2,)
    write_text(config, "augmentation:\n  enabled: false\n")
    assert load_model(run, "cpu").mirror_axes == ()


def test_not_a_run(tmp_path, run):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"found no plan\.json"):
        load_model(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"nothing is trained yet.*segmamba train"
    ):
        load_model(run)
    (run / "dataset.json").write_text("{}")
    save_fold(run, "0")
    with pytest.raises(FormatError, match=r"dataset\.json"):
        load_model(run)


def test_a_changed_plan_is_refused(run):
    save_fold(run, "0")
    wider = dataclasses.replace(PLAN, patch_size=(32, 32, 32))
    save_plan(run / "plan.json", wider)
    assert load_model(run, "cpu").plan.patch_size == (32, 32, 32)
    save_plan(run / "plan.json", dataclasses.replace(PLAN, spacing_mm=(2.0, 1.0, 1.0)))
    with pytest.raises(CheckpointError, match="plan was changed"):
        load_model(run, "cpu")


def test_other_labels_are_refused(run):
    save_fold(run, "0")
    data = json.loads((run / "dataset.json").read_text())
    data["labels"]["labels"]["third"] = 3
    (run / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="4 out, found 1 in, 3 out"):
        load_model(run, "cpu")


def test_broken_weights_are_refused(run):
    path = save_fold(run, "0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't read a checkpoint"):
        load_model(run, "cpu")
    path.write_bytes(b"\x80\x04a pickle, perhaps")
    with pytest.raises(CheckpointError, match="can't read a checkpoint"):
        load_model(run, "cpu")
    state = create_network_of_plan().state_dict()
    save_checkpoint(path, state, {"kind": "training state"})
    with pytest.raises(CheckpointError, match="not a model file"):
        load_model(run, "cpu")
    shutil.rmtree(path.parent)
    name, tensor = state.popitem()
    save_fold(run, "0")
    save_model(path, {**state, "odd": tensor}, network=PLAN.network)
    with pytest.raises(CheckpointError, match=f"also {name}, found unknown odd"):
        load_model(run, "cpu")
    save_model(path, {**state, name: tensor[:-1]}, network=PLAN.network)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_model(run, "cpu")
