"""A training gets the batches that were made for it, on its device."""

from __future__ import annotations

import threading

import pytest
import torch

from segmamba.data.augment import Batch
from segmamba.training.feed import Feed

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_batch(step: int) -> Batch:
    image = torch.full((1, 1, 2, 2, 2), float(step))
    return Batch(image, image[:, 0].short())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers):
    with Feed(make_batch, CPU, 3, 9, workers) as feed:
        found = [float(feed.next().image.mean()) for _ in range(3, 9)]
        with pytest.raises(StopIteration):
            feed.next()
    assert found == [3, 4, 5, 6, 7, 8]


def test_no_thread_is_left():
    with Feed(make_batch, CPU, workers=2) as feed:
        feed.next()
        assert feed.waited_s() > 0
    names = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    assert not [name for name in names if "segmamba-batches" in name]


@needs_gpu
@pytest.mark.parametrize("workers", [0, 4])
def test_a_gpu_gets_whole_batches_from_other_streams(workers):
    """Large ones, made slowly, and their memory reused while training is at them."""
    device = torch.device("cuda", torch.cuda.current_device())

    def slow(step: int) -> Batch:
        image = torch.full((2, 4, 96, 96, 96), float(step)).pin_memory()
        image = image.to(device, non_blocking=True)
        for _ in range(50):
            image = image + 1
        return Batch(image, image[:, 0].short())

    with Feed(slow, device, 0, 12, workers) as feed:
        for step in range(12):
            batch = feed.next()
            for _ in range(20):  # keeps the training's stream busy behind the feed
                batch.image.square().sum()
            assert batch.image.device == device
            assert torch.equal(batch.image, torch.full_like(batch.image, step + 50.0))
            assert int(batch.label.min()) == int(batch.label.max()) == step + 50
