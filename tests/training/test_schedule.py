"""The learning rate against values worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from segmamba.config import TrainConfig
from segmamba.training.schedule import learning_rate_at, progress_at, total_steps

CONFIG = TrainConfig(learning_rate=0.01, max_epochs=10, iterations_per_epoch=25)


def rate(progress: float, **changes) -> float:
    return learning_rate_at(progress, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.01), (0.5, 0.01 * 0.5358867312681466), (0.9, 0.01 * 10**-0.9), (1.0, 0.0)],
)
def test_poly(progress, expected):
    assert rate(progress) == pytest.approx(expected, rel=1e-12)


def test_cosine():
    assert rate(0.0, schedule="cosine") == pytest.approx(0.01)
    assert rate(0.25, schedule="cosine") == pytest.approx(0.01 * (2 + 2**0.5) / 4)
    assert rate(1.0, schedule="cosine") == pytest.approx(0.0, abs=1e-15)


def test_constant():
    assert rate(0.7, schedule="constant") == 0.01


def test_warmup_rises_on_a_line_and_the_decay_fills_the_rest():
    assert rate(0.0, warmup=0.2) == pytest.approx(0.0001)
    assert rate(0.1, warmup=0.2) == pytest.approx(0.00505)
    assert rate(0.2, warmup=0.2) == pytest.approx(0.01)
    assert rate(0.6, warmup=0.2) == pytest.approx(0.01 * 0.5**0.9)


def test_steps_count_where_there_is_no_time():
    assert total_steps(CONFIG) == 250
    assert progress_at(50, 1e9, CONFIG) == 0.2
    assert total_steps(dataclasses.replace(CONFIG, max_epochs=None)) == 25_000


def test_clock_counts_where_there_are_no_epochs():
    config = dataclasses.replace(CONFIG, max_epochs=None, max_time_s=60.0)
    assert total_steps(config) == math.inf
    assert progress_at(10**6, 15.0, config) == 0.25
    assert progress_at(0, 61.0, config) == 1.0


def test_the_nearer_end_counts():
    config = dataclasses.replace(CONFIG, max_time_s=100.0)
    assert progress_at(50, 10.0, config) == 0.2
    assert progress_at(50, 30.0, config) == 0.3
