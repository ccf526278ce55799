"""A real BraTS case through a run's folder, with a tiny untrained network."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segmamba.atomic import write_json
from segmamba.checkpoint import save_model
from segmamba.data.dataset import dataset_to_dict
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import ChannelNormalization, Plan, plan_hash, save_plan
from segmamba.inference import find_cases, load_model, predict_cases
from segmamba.nn import create_network

CASE = "BraTS2021_01480"


@pytest.fixture
def run(tmp_path, shared_data) -> Path:
    """What training would leave: a plan at 5 mm, so that it is fast."""
    torch.manual_seed(1)
    network = create_network(
        "segmamba-light",
        in_channels=4,
        out_channels=3,
        dims=(4, 8),
        hidden_size=8,
        depths=(1, 1),
        strides=(2, 2),
    )
    plan = Plan(
        orientation="SPL",
        spacing_mm=(5.0, 5.0, 5.0),
        patch_size=(32, 32, 32),
        batch_size=1,
        normalization=(ChannelNormalization("zscore-nonzero"),) * 4,
        network=network.config,
    )
    save_plan(tmp_path / "run" / "plan.json", plan)
    dataset = load_dataset(shared_data / "BraTS")
    write_json(tmp_path / "run" / "dataset.json", dataset_to_dict(dataset))
    save_model(
        tmp_path / "run" / "fold_0" / "model.safetensors",
        network.state_dict(),
        network=network.config,
        metadata={"plan_hash": plan_hash(plan)},
    )
    return tmp_path / "run"


@pytest.mark.slow
def test_brats_case_keeps_its_place(run, tmp_path, shared_data):
    predictor = load_model(run, "cpu", mirror=False, overlap=0.25, precision="fp32")
    folder = shared_data / "BraTS" / CASE
    cases = find_cases(folder, predictor.channels)
    out = tmp_path / "out"
    summary = predict_cases(predictor, cases, out)
    assert summary.done == (CASE,), summary.failed
    label, scan = nib.load(out / f"{CASE}.nii.gz"), nib.load(cases[0].images[0])
    assert label.shape == scan.shape == (240, 240, 155)
    np.testing.assert_array_equal(label.affine, scan.affine)
    assert label.header["qform_code"] == scan.header["qform_code"]
    values = np.asarray(label.dataobj)
    assert values.dtype == np.uint8
    assert set(np.unique(values)) <= {0, 1, 2, 4}
    assert len(np.unique(values)) > 1  # untrained, but not empty: geometry shows

    # The same patient, stored with other axes, gets the same label map.
    order = np.array([[2, -1], [0, 1], [1, -1]], float)
    turned = tmp_path / "turned"
    turned.mkdir()
    for path in cases[0].images:
        nib.save(nib.load(path).as_reoriented(order), turned / path.name)
    predict_cases(predictor, turned, out / "turned")
    again = nib.load(out / "turned" / f"{CASE}.nii.gz")
    expected = label.as_reoriented(order)
    np.testing.assert_allclose(again.affine, expected.affine)
    np.testing.assert_array_equal(
        np.asarray(again.dataobj), np.asarray(expected.dataobj)
    )
