"""Fixtures that every room shares."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import yaml

from segmamba import Volume, workflow
from segmamba.atomic import write_json
from segmamba.checkpoint import save_model
from segmamba.data.dataset import dataset_to_dict
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import ChannelNormalization, Plan, plan_hash, save_plan
from segmamba.io import write_label_map, write_volume
from segmamba.nn import create_network

REPOSITORY = Path(__file__).parents[1]

# Test processes that take all cores each wait for one another, three times as long.
_SHARE = max(
    1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
)
torch.set_num_threads(_SHARE)
os.environ.setdefault("OMP_NUM_THREADS", str(_SHARE))  # of programs that tests start

# The same examples every time: a change must fail by itself, not by a draw. New ones
# are drawn by benchmarks/fuzz.py, or with --hypothesis-profile=default.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real scans in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference results of the published blocks."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
SETTINGS = {
    "preset": "segmamba-light",
    "network": {"dims": [8, 16], "base_channels": 8, "depths": [0, 1]},
    "plan": {"patch_size": [16, 16, 16], "batch_size": 2},
    "train": {"iterations_per_epoch": 4, "max_epochs": 2, "precision": "fp32"},
}


def make_dataset(folder: Path, cases: int = 6) -> Path:
    """Write bright balls on noise in the Decathlon's layout."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"))
    training = []
    for index in range(cases):
        center = random.uniform(6, 14, (3, 1, 1, 1))
        ball = ((grid - center) ** 2).sum(0) < 25
        image = random.normal(100, 10, (1, 20, 20, 20)) + 100 * ball
        image_path = folder / "imagesTr" / f"case_{index}.nii.gz"
        label_path = folder / "labelsTr" / f"case_{index}.nii.gz"
        write_volume(image_path, Volume(image.astype(np.float32), AFFINE))
        write_label_map(label_path, ball.astype(np.uint8), AFFINE)
        training.append(
            {
                "image": f"./imagesTr/{image_path.name}",
                "label": f"./labelsTr/{label_path.name}",
            }
        )
    description = {
        "name": "Balls",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "ball"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def make_study(folder: Path) -> None:
    """Write two DICOM series on one grid, of numbers 3 and 13."""
    sys.path.append(str(Path(__file__).parent / "io"))
    import dicom_series

    for number, name in ((3, "T1 ax"), (13, "T2 ax")):
        voxels = np.random.default_rng(number).integers(0, 300, (20, 20, 20))
        group = dicom_series.datasets(
            voxels.astype(np.int16), number=number, description=name
        )
        dicom_series.write(folder / name, group)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, run/, predictions/, scans/, study/ and settings.yaml."""
    folder = tmp_path_factory.mktemp("project")
    make_dataset(folder / "data")
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))
    workflow.train(folder / "data", folder / "run", config=settings, device="cpu")
    workflow.predict(
        folder / "run", folder / "data", folder / "predictions", mirror=False
    )
    shutil.copytree(folder / "data" / "imagesTr", folder / "scans")
    shutil.copy(folder / "scans" / "case_0.nii.gz", folder / "scan.nii.gz")
    make_study(folder / "study")
    return folder


@pytest.fixture
def brats_run(tmp_path: Path, shared_data: Path) -> Path:
    """An untrained network for BraTS in a run's folder; at 5 mm, so that it is fast."""
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
    with torch.no_grad():  # every output on both sides of zero: all labels come up
        for parameter in list(network.parameters())[-2:]:
            parameter.mul_(0 if parameter.ndim == 1 else 10)
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
