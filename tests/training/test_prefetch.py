"""Batches come in order, errors come through, and no thread stays."""

from __future__ import annotations

import random
import threading
import time

import pytest

from segmamba.training.prefetch import SPARE, Prefetcher


def threads() -> list[threading.Thread]:
    names = [item for item in threading.enumerate() if "segmamba-batches" in item.name]
    return [item for item in names if item.is_alive()]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_order_is_kept_however_long_each_takes(workers):
    def make(step: int) -> int:
        time.sleep(random.Random(step).random() / 100)
        return step

    with Prefetcher(make, 3, 20, workers) as batches:
        assert list(batches) == list(range(3, 20))
    assert threads() == []


def test_no_more_is_prepared_than_the_bound():
    made = []
    with Prefetcher(made.append, 0, None, workers=2) as batches:
        next(batches)
        time.sleep(0.2)
        assert sorted(made)[-1] == 2 + SPARE
        assert len(made) == 2 + SPARE + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_step_and_ends_the_threads(workers):
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no such case")
        return step

    seen = []

    def take() -> None:
        with Prefetcher(make, 0, None, workers) as batches:
            for batch in batches:
                seen.append(batch)

    with pytest.raises(ValueError, match="no such case"):
        take()
    assert seen == [0, 1]
    assert threads() == []


def test_ctrl_c_ends_the_threads():
    def take() -> None:
        with Prefetcher(lambda step: step, workers=3) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take()
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_for_batches_is_timed(workers):
    def make(step: int) -> int:
        time.sleep(0.05)
        return step

    with Prefetcher(make, workers=workers) as batches:
        next(batches)
        assert 0.04 < batches.waited_s() < 5
        assert batches.waited_s() == 0
        time.sleep(0.3)
        next(batches)
        assert (batches.waited_s() < 0.04) == (workers == 1)
