"""Fixtures that every room shares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from segmamba import Volume, workflow
from segmamba.io import write_label_map, write_volume

REPOSITORY = Path(__file__).parents[1]


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


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, a trained run/, predictions/, scans/ and settings.yaml."""
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
    return folder
