"""A run that is gone on with: the same cases, and who counts as trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from segmamba import cli, workflow
from segmamba.checkpoint import load_model_metadata, update_model
from segmamba.errors import ConfigError
from segmamba.workflow.fold import split_hash


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The project, to be changed at will."""
    shutil.copytree(project / "run", tmp_path / "run")
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copy(project / "settings.yaml", tmp_path)
    # The data set is another one by its folder: let the run know it by the new one.
    description = json.loads((tmp_path / "run" / "dataset.json").read_text())
    text = json.dumps(description).replace(str(project), str(tmp_path))
    (tmp_path / "run" / "dataset.json").write_text(text)
    return tmp_path


def train(folder: Path, **options) -> workflow.TrainingOutcome:
    return workflow.train(
        folder / "data",
        folder / "run",
        config=folder / "settings.yaml",
        device="cpu",
        **options,
    )


def swap(splits: list[dict]) -> None:
    first = splits[0]
    first["train"][0], first["val"][0] = first["val"][0], first["train"][0]


def grow(splits: list[dict]) -> None:
    splits[0]["train"].append(splits[0]["val"].pop())


def shrink(splits: list[dict]) -> None:
    splits[0]["val"].pop()


@pytest.mark.parametrize("edit", [swap, grow, shrink])
def test_an_edited_split_is_noticed(copy: Path, edit: Callable) -> None:
    path = copy / "run" / "splits.json"
    before = path.read_text()
    metrics = (copy / "run" / "fold_0" / "metrics.json").read_bytes()
    splits = json.loads(before)
    edit(splits)
    path.write_text(json.dumps(splits))
    with pytest.raises(ConfigError, match=r"cases are others.*Put splits\.json"):
        train(copy, resume=True)
    assert (copy / "run" / "fold_0" / "metrics.json").read_bytes() == metrics
    path.write_text(before)
    assert train(copy, resume=True).metrics is not None


def test_an_edit_of_another_fold_does_not_matter(copy: Path) -> None:
    path = copy / "run" / "splits.json"
    splits = json.loads(path.read_text())
    swap(splits[1:])
    path.write_text(json.dumps(splits))
    assert train(copy, resume=True).metrics is not None


def test_the_hash_tells_choices_apart() -> None:
    first = split_hash({"train": ["a", "b"], "val": ["c"]})
    assert first == split_hash({"val": ["c"], "train": ["a", "b"]})
    others = [
        {"train": ["a"], "val": ["b", "c"]},
        {"train": ["b", "a"], "val": ["c"]},
        {"train": ["a", "b"], "val": []},
        {"train": ["ab"], "val": ["c"]},
    ]
    assert first not in {split_hash(other) for other in others}


def test_a_half_trained_fold_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy / "run" / "fold_0" / "model.safetensors"
    assert load_model_metadata(model)["finished"] is True
    update_model(model, finished=False)
    words = [str(copy / "run"), str(copy / "data"), "-o", str(copy / "out")]
    assert cli.main(["predict", *words, "--no-mirror"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: fold_0 is half-trained (step 8)")
    assert cli.main(["info", str(copy / "run")]) == 0
    assert "half-trained" in capsys.readouterr().out
    record = json.loads((copy / "out" / "manifest.json").read_text())
    assert record["model"]["finished"] == [False]
