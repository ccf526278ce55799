"""The log survives cuts, and TensorBoard gets the same numbers."""

from __future__ import annotations

import json
import math
import sys

import pytest

from segmamba.errors import TrainingError
from segmamba.training.logger import RunLogger, overall_score, read_log


def line(epoch: int, **more) -> dict:
    return {"epoch": epoch, "step": epoch * 5, "loss": 1 / epoch, **more}


def test_lines_are_on_disk_at_once_and_nan_is_null(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.write(line(1, validation={"dice": math.nan, "classes": [0.5, 1.0]}))
        text = logger.path.read_text()
    assert json.loads(text)["validation"] == {"dice": None, "classes": [0.5, 1.0]}


def test_a_resumed_log_is_cut_behind_its_epoch(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        for epoch in (1, 2, 3):
            logger.write(line(epoch))
    with logger.path.open("a") as file:
        file.write('{"epoch": 4, "st')
    with RunLogger(tmp_path, first_epoch=2, tensorboard=False) as logger:
        logger.write(line(3, again=True))
    assert read_log(logger.path) == [line(1), line(2), line(3, again=True)]


def test_a_missing_log_is_empty(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_log_that_cant_be_written_says_so(tmp_path):
    with RunLogger(tmp_path, tensorboard=False) as logger:
        logger.path.mkdir()
        with pytest.raises(TrainingError, match="can't write the log"):
            logger.write(line(1))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [({"score": 0.5, "hd95": 9}, 0.5), ({"a": 0.2, "b": {"c": 0.4}}, 0.3)],
)
def test_the_score_that_counts(scores, expected):
    assert overall_score(scores) == pytest.approx(expected)
    assert math.isnan(overall_score({}))


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLogger(tmp_path) as logger:
        logger.write(line(1, validation={"dice": 0.5}))
        logger.write(line(2, validation={"dice": 0.75}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(item.step, item.value) for item in events.Scalars("validation/dice")]
    assert found == [(5, 0.5), (10, 0.75)]


def test_it_works_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLogger(tmp_path) as logger:
        logger.write(line(1))
    assert [item.name for item in tmp_path.iterdir()] == ["log.jsonl"]
