"""What a demo draws of data of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.demo import run
from segmamba.io import Volume, write_label_map, write_volume


def test_a_frame_is_drawn_where_a_case_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Volume] = []
    monkeypatch.setattr(
        run, "case_figure", lambda image, *args, **options: drawn.append(image)
    )
    frames = np.arange(3.0, dtype=np.float32)[:, None, None, None] + np.zeros((4, 4, 4))
    scan, label = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    write_volume(scan, Volume(frames.astype(np.float32), np.eye(4)))
    for path in (label, tmp_path / "validation" / "a.nii.gz"):
        write_label_map(path, np.ones((4, 4, 4), np.uint8), np.eye(4))
    scheme = LabelScheme({"background": 0, "all": 1})
    cases = (Case("a", (scan,), label, 2),)
    dataset = Dataset("own", tmp_path, "csv", ("ct",), scheme, cases)
    metrics = {"cases": {"a": {"all": {"dice": 1.0}}}}
    run._draw(dataset, metrics, tmp_path, tmp_path / "figure.png")
    assert drawn[0].array.shape == (1, 4, 4, 4)
    assert np.all(drawn[0].array == 2)
