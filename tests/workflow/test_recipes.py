"""Every recipe plans as it stands, and trains on data of its channels and labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from segmamba import Volume, workflow
from segmamba.config import TrainConfig, from_dict, load_yaml, to_dict
from segmamba.data.plan import load_plan
from segmamba.data.splits import paper_split
from segmamba.io import write_label_map, write_volume
from segmamba.workflow.folder import load_settings
from segmamba.workflow.train import train_config

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(
    path for path in FOLDER.rglob("*.yaml") if path.parent.name != "ablation"
)
CONTRASTS = ("FLAIR", "T1w", "t1gd", "T2w")
DATA = {
    "brats2023-paper": "brats",
    "brats2023-code": "brats",
    "aiib2023": (("CT",), ("airway",)),
    "crc-ct": (("CT",), ("cancer",)),
    "task01-brain-tumour": (CONTRASTS, ("edema", "non-enhancing", "enhancing")),
    "task02-heart": (("MRI",), ("left atrium",)),
    "task04-hippocampus": (("MRI",), ("Anterior", "Posterior")),
    "task09-spleen": (("CT",), ("spleen",)),
}
"""Layout, or channels and labels of the Decathlon's layout."""
SMALL = {"dims": [4, 6], "hidden_size": 8, "depths": [1, 1]}
SHORT = {"iterations_per_epoch": 2, "max_epochs": 1, "precision": "fp32"}
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def simulate(random: np.random.Generator, channels: int, labels: int):
    """Draw boxes in boxes on noise: (C, I, J, K) and their label map."""
    label_map = np.zeros((20, 18, 16), np.uint8)
    for value in range(1, labels + 1):
        start, stop = 2 + 2 * value, 16 - 2 * value
        label_map[start:stop, start:stop, start:stop] = value
    noise = random.normal(100, 10, (channels, *label_map.shape))
    return (noise + 50 * label_map).astype(np.float32), label_map


def write_brats(folder: Path, random: np.random.Generator) -> None:
    for index in range(3):
        case = folder / f"BraTS-GLI-{index:05d}-000"
        image, label_map = simulate(random, 4, 3)
        for kind, channel in zip(("t1n", "t1c", "t2w", "t2f"), image, strict=True):
            path = case / f"{case.name}-{kind}.nii.gz"
            write_volume(path, Volume(channel[None], AFFINE))
        write_label_map(case / f"{case.name}-seg.nii.gz", label_map, AFFINE)


def write_decathlon(
    folder: Path,
    random: np.random.Generator,
    channels: tuple[str, ...],
    labels: tuple[str, ...],
) -> None:
    training = []
    for index in range(3):
        image, label_map = simulate(random, len(channels), len(labels))
        pair = {
            "image": f"./imagesTr/case_{index}.nii.gz",
            "label": f"./labelsTr/case_{index}.nii.gz",
        }
        write_volume(folder / pair["image"], Volume(image, AFFINE))
        write_label_map(folder / pair["label"], label_map, AFFINE)
        training.append(pair)
    description = {
        "name": folder.name,
        "modality": {str(i): name for i, name in enumerate(channels)},
        "labels": {str(i): name for i, name in enumerate(("background", *labels))},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def test_each_recipe_has_data():
    assert {recipe.stem for recipe in RECIPES} == set(DATA)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_plans_as_it_stands_and_trains_two_steps(recipe: Path, tmp_path: Path):
    kind, random = DATA[recipe.stem], np.random.default_rng(0)
    if isinstance(kind, str):
        write_brats(tmp_path / "data", random)
    else:
        write_decathlon(tmp_path / "data", random, *kind)
    settings = load_settings(recipe)
    plan = workflow.plan(
        tmp_path / "data", tmp_path / "whole", config=recipe, device="cpu"
    )
    assert plan.network.name == settings.preset
    for key, value in settings.plan.items():
        found = json.loads(json.dumps(to_dict(plan)))[key]
        if key == "normalization":
            assert [rule["scheme"] for rule in found] == [r["scheme"] for r in value]
        else:
            assert found == value, key
    tiny = dataclasses.replace(
        settings,
        network={**settings.network, **SMALL},
        plan={**settings.plan, "patch_size": [16, 16, 16], "batch_size": 1},
        train={**settings.train, **SHORT},
    )
    result = workflow.train(
        tmp_path / "data",
        tmp_path / "run",
        config=tiny,
        device="cpu",
        split="70-10-20",
    )
    config = load_yaml(result.folder / "config.yaml")
    wanted = train_config(load_plan(tmp_path / "run" / "plan.json"), tiny)
    assert from_dict(TrainConfig, config) == wanted
    lines = (result.folder / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [line["epoch"] for line in log] == [1]
    assert np.isfinite(log[0]["loss"])
    assert result.metrics is not None
    names = kind[1] if isinstance(kind, tuple) else ("WT", "TC", "ET")
    assert set(result.metrics["summary"]) == set(names)


def test_text_and_code_differ_where_the_docs_say():
    paper, code = (
        load_settings(FOLDER / f"brats2023-{name}.yaml") for name in ("paper", "code")
    )
    assert (paper.preset, code.preset) == ("segmamba-paper", "segmamba")
    assert paper.plan == code.plan
    assert code.network == {"initialization": "published"}
    differing = {
        key
        for key in {*paper.train, *code.train}
        if paper.train.get(key) != code.train.get(key)
    }
    assert differing == {
        "weight_decay",
        "precision",
        "oversample_foreground",
        "augmentation",
    }
    assert (paper.train["weight_decay"], code.train["weight_decay"]) == (1e-5, 3e-5)
    for settings in (paper, code):
        assert settings.plan["patch_size"] == [128, 128, 128]
        assert settings.plan["batch_size"] == 2
        assert settings.train["max_epochs"] == 1000
        assert settings.train["learning_rate"] == 0.01
        assert settings.train["loss"] == "ce"
        assert settings.train["optimizer"] == "sgd"
        assert settings.train["schedule"] == "poly"


def test_the_split_of_brats_2023_has_the_stated_sizes():
    split = paper_split(f"case_{index:04d}" for index in range(1251))
    sizes = {name: len(ids) for name, ids in split.items()}
    assert sizes == {"train": 876, "val": 125, "test": 250}
