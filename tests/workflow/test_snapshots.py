"""Weights kept while training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from segmamba import workflow
from segmamba.checkpoint import load_model_file
from segmamba.workflow.folder import RunSettings
from segmamba.workflow.snapshots import snapshots_due


@pytest.mark.parametrize(
    ("progress", "due"),
    [(0.0, 0), (0.49, 0), (0.5, 1), (0.6, 1), (0.63, 2), (0.8, 3), (0.9, 4), (1.0, 4)],
)
def test_snapshots_are_spread_over_the_second_half(progress: float, due: int) -> None:
    assert snapshots_due(progress, 4) == due
    assert snapshots_due(progress, 0) == 0


def test_training_keeps_so_many_weights(project: Path, tmp_path: Path) -> None:
    settings = RunSettings(**yaml.safe_load((project / "settings.yaml").read_text()))
    settings.train.update(max_epochs=4, iterations_per_epoch=2, snapshots=2)
    workflow.train(project / "data", tmp_path / "run", config=settings, device="cpu")
    fold = tmp_path / "run" / "fold_0"
    kept = [
        load_model_file(fold / "snapshots" / name / "model.safetensors")
        for name in ("1", "2")
    ]
    last = load_model_file(fold / "model.safetensors")
    assert [model.metadata["step"] for model in (*kept, last)] == [4, 6, 8]
    assert sorted(path.name for path in (fold / "snapshots").iterdir()) == ["1", "2"]
    assert {model.metadata["weights"] for model in kept} == {"ema"}
    name = next(iter(last.tensors))
    first, second, end = (m.tensors[name] for m in (*kept, last))
    assert not torch.equal(first, second)
    assert not torch.equal(second, end)
