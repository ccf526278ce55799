"""Manifests are complete, and agree with the files that they name."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from segmamba import cli, workflow
from segmamba.checkpoint import load_model_file, update_model
from segmamba.errors import TrainingError
from segmamba.training.trainer import Trainer

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SCHEMA = json.loads((REFERENCE / "manifest.schema.json").read_text())


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data, run and predictions to change at will."""
    for name in ("data", "run", "predictions"):
        shutil.copytree(project / name, tmp_path / name)
    shutil.copy(project / "settings.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> int:
    return cli.main(shlex.split(line))


def load(path: Path) -> dict[str, Any]:
    """Read a manifest and hold it to the schema of its command."""
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(path.read_text())
    kind = {"train": "train", "predict": "predict"}.get(data["command"], "files")
    schema = {"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(data)
    return data


def agree(records: list[dict[str, Any]], folder: Path = Path()) -> None:
    assert records
    for record in records:
        content = (folder / record["path"]).read_bytes()
        assert record["bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_schema_is_one_and_takes_each_manifest(project: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    data = json.loads((project / "predictions" / "manifest.json").read_text())
    assert validator.is_valid(data)
    for key in data:
        assert not validator.is_valid({k: v for k, v in data.items() if k != key}), key
    assert not validator.is_valid({**data, "more": 1})


def test_every_key_of_the_schema_is_explained() -> None:
    page = (REFERENCE / "manifest.md").read_text()
    explained = set(re.findall(r"`(\w+)`", page))
    keys = {key for item in SCHEMA["$defs"].values() for key in item["properties"]}
    inner = [
        sub
        for item in SCHEMA["$defs"].values()
        for value in item["properties"].values()
        for sub in value.get("properties", {})
    ]
    assert not {*keys, *inner} - explained


def test_training_is_recorded(project: Path) -> None:
    fold = project / "run" / "fold_0"
    data = load(fold / "manifest.json")
    agree(data["inputs"])
    agree(data["outputs"], fold)
    assert {Path(row["path"]).name for row in data["outputs"]} >= {
        *("model.safetensors", "config.yaml", "settings.yaml", "log.jsonl"),
        *("metrics.json", f"{data['split']['val'][0]}.nii.gz"),
    }
    assert len(data["inputs"]) == 2 * 6
    sums = "".join(f"{row['sha256']}\n" for row in data["inputs"])
    assert data["data"]["sha256"] == hashlib.sha256(sums.encode()).hexdigest()
    assert data["status"] == "finished"
    assert data["seed"] == data["options"]["seed"] == 12345
    splits = json.loads((project / "run" / "splits.json").read_text())
    assert splits[0].items() <= data["split"].items()
    assert data["step"] == data["sessions"][0]["last_step"] == 8
    assert data["sessions"][0]["first_step"] == 0
    metrics = json.loads((fold / "metrics.json").read_text())
    assert data["dice"] == {"ball": metrics["summary"]["ball"]["dice"]["mean"]}
    assert data["versions"]["torch"] == torch.__version__
    assert data["peak_memory_mib"]["process"] > 100
    load(fold / "validation" / "manifest.json")


def test_predictions_are_recorded(project: Path) -> None:
    folder = project / "predictions"
    data = load(folder / "manifest.json")
    agree(data["model"]["files"])
    names = {Path(row["path"]).name for row in data["model"]["files"]}
    assert names == {"model.safetensors", "plan.json", "dataset.json"}
    assert sorted(data["cases"]) == [f"case_{index}" for index in range(6)]
    for case in data["cases"].values():
        agree(case["inputs"])
        agree(case["outputs"], folder)
        image = nib.load(folder / case["outputs"][0]["path"])
        assert case["shape"] == list(image.shape)
        np.testing.assert_allclose(case["spacing_mm"], image.header.get_zooms())
        voxels = np.count_nonzero(np.asarray(image.dataobj) == 1)
        assert case["volumes_ml"]["ball"] == pytest.approx(voxels / 1000)


def test_scores_and_comparisons_are_recorded(here: Path) -> None:
    assert run("evaluate predictions data -o out/a.json") == 0
    data = load(here / "out" / "a_manifest.json")
    assert data["command_line"] == "segmamba evaluate predictions data -o out/a.json"
    assert data["folder"] == str(here)
    agree(data["inputs"])
    agree(data["outputs"])
    assert len(data["inputs"]) == 12
    shutil.copy(here / "out" / "a.json", here / "out" / "b.json")
    assert run("compare out/a.json out/b.json -o comparison") == 0
    data = load(here / "comparison" / "comparison_manifest.json")
    agree(data["inputs"])
    agree(data["outputs"])
    written = {path.name for path in (here / "comparison").iterdir()}
    named = {Path(row["path"]).name for row in data["outputs"]}
    assert written - named == {"comparison_manifest.json"}


def test_warnings_and_failures_are_recorded(here: Path) -> None:
    update_model(here / "run" / "fold_0" / "model.safetensors", finished=False)
    (here / "data" / "imagesTr" / "case_1.nii.gz").write_bytes(b"no scan")
    assert run("predict run data/imagesTr -o new/out --no-mirror") == 1
    data = load(here / "new" / "out" / "manifest.json")
    assert "half-trained" in data["warnings"][0]
    failed = data["cases"]["case_1"]
    assert failed["status"] == "failed"
    assert "case_1.nii.gz" in failed["error"]
    agree(failed["inputs"])


def test_label_maps_without_a_manifest_get_one(here: Path) -> None:
    (here / "predictions" / "manifest.json").unlink()
    assert run("predict run data -o predictions --no-mirror") == 0
    data = load(here / "predictions" / "manifest.json")
    assert {case["status"] for case in data["cases"].values()} == {"skipped"}


def test_an_interrupted_training_says_so_and_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(**options: Any) -> None:
        workflow.train("data", "new", config="settings.yaml", device="cpu", **options)

    shutil.copytree("run", "new", ignore=lambda *_: ["fold_0"])
    step = Trainer._step

    def stop_early(self: Trainer, batch: Any) -> None:
        step(self, batch)
        if self.state.step == 6:
            self.save()
            raise TrainingError("a thunderstorm")

    path = here / "new" / "fold_0" / "manifest.json"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_early)
        with pytest.raises(TrainingError, match="thunderstorm"):
            train()
    assert load(path)["status"] == "stopped: a thunderstorm"
    train(resume=True)
    data = load(path)
    assert data["status"] == "finished"
    steps = [(call["first_step"], call["last_step"]) for call in data["sessions"]]
    assert steps == [(0, 6), (6, 8)]


def test_info_says_how_to_train_the_very_same_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((here / "settings.yaml").read_text())
    settings["train"].update(seed=7, max_epochs=1, learning_rate=0.01)
    settings["network"]["d_state"] = 8
    (here / "other.yaml").write_text(yaml.safe_dump(settings))
    assert run("train data -o first --config other.yaml --fold 1 --device cpu") == 0
    (here / "other.yaml").unlink()
    capsys.readouterr()
    assert cli.main(["info", "first"]) == 0
    shown = capsys.readouterr().out
    assert "as it was" in shown
    (line,) = [row for row in shown.splitlines() if row.startswith("Fold 1 again: ")]
    again = shlex.split(line.removeprefix("Fold 1 again: "))
    assert cli.main(again[1:]) == 0
    first, second = (
        load_model_file(here / name / "fold_1" / "model.safetensors").tensors
        for name in ("first", "run-again")
    )
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_info_notices_other_data(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workflow.train("data", "new", config="settings.yaml", device="cpu", max_epochs=1)
    path = here / "data" / "labelsTr" / "case_3.nii.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    assert cli.main(["info", "new"]) == 0
    shown = capsys.readouterr().out
    assert "1 files changed or gone: case_3.nii.gz" in shown


def test_predictions_repeat_to_the_bit(here: Path) -> None:
    for name in ("one", "two"):
        assert run(f"predict run data --probabilities --device cpu -o {name}") == 0
    one, two = (
        {
            path.relative_to(here / name): path.read_bytes()
            for path in (here / name).rglob("*.nii.gz")
        }
        for name in ("one", "two")
    )
    assert len(one) == 12
    assert one == two
