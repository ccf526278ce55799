"""Batches are a function of the seed and the step, whatever happens in between."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segmamba.config import AugmentationConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.sampler import PatchSampler
from segmamba.training import batch_maker, batches
from segmamba.training.batches import BatchMaker
from segmamba.training.feed import Feed
from segmamba.training.prefetch import Prefetcher


class TwoCases:
    """Two cases in memory in place of a cache."""

    def load(self, case_id: str) -> SimpleNamespace:
        random = np.random.default_rng(int(case_id))
        image = random.normal(size=(2, 20, 18, 22)).astype(np.float16)
        label = (image[0] > 1).astype(np.int16)
        return SimpleNamespace(
            image=image, label=label, foreground={1: np.argwhere(label)}
        )


@pytest.fixture
def make_batch():
    config = AugmentationConfig(p_rotation=1.0, p_noise=1.0, p_gamma=1.0)
    scheme = LabelScheme({"background": 0, "ball": 1})
    sampler = PatchSampler(
        TwoCases(), ["1", "2"], (8, 10, 12), 2, scheme, seed=3, margin=config
    )
    return batch_maker(sampler, config, seed=3)


def test_shape_and_type(make_batch):
    batch = make_batch(0)
    assert batch.image.shape == (2, 2, 8, 10, 12)
    assert batch.image.dtype == torch.float32
    assert batch.label.shape == (2, 8, 10, 12)
    assert batch.label.dtype == torch.int16


def test_threads_give_the_very_bits_of_a_single_call(make_batch):
    with Prefetcher(make_batch, 4, 10, workers=3) as prefetched:
        ahead = list(prefetched)
    torch.manual_seed(99)
    np.random.default_rng(1).random(3)
    for step, batch in zip(range(4, 10), ahead, strict=True):
        again = make_batch(step)
        assert torch.equal(batch.image, again.image)
        assert torch.equal(batch.label, again.label)


def test_steps_differ(make_batch):
    assert not torch.equal(make_batch(0).image, make_batch(1).image)


def test_messages_can_name_the_cases(make_batch):
    names = [make_batch(step).case_ids for step in range(8)]
    assert {len(item) for item in names} == {2}
    assert {name for item in names for name in item} == {"1", "2"}


def test_several_steps_at_once_give_what_each_gives_alone(make_batch, monkeypatch):
    alone = [make_batch(step) for step in range(6)]
    monkeypatch.setattr(BatchMaker, "steps_at_once", 3)
    for step in (5, 0, 1, 2, 3, 4):
        batch = make_batch(step)
        torch.testing.assert_close(batch.image, alone[step].image, atol=2e-3, rtol=0)
        assert (batch.label == alone[step].label).float().mean() > 0.999
        assert batch.case_ids == alone[step].case_ids


@pytest.mark.parametrize(("first", "stop"), [(0, 7), (4, 9), (5, 6), (3, None)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_gets_the_same_bits(
    make_batch, monkeypatch, first, stop, workers
):
    """Also where it goes on in the midst of steps that are made at once."""
    monkeypatch.setattr(BatchMaker, "steps_at_once", 3)
    with Feed(make_batch, torch.device("cpu"), workers=workers) as feed:
        whole = [feed.next() for _ in range(12)]
    with Feed(make_batch, torch.device("cpu"), first, stop, workers) as feed:
        for step in range(first, stop or 10):
            batch = feed.next()
            assert torch.equal(batch.image, whole[step].image)
            assert torch.equal(batch.label, whole[step].label)
            assert batch.case_ids == whole[step].case_ids
        if stop is not None:
            with pytest.raises(StopIteration):
                feed.next()


def test_a_cpu_makes_one_batch_at_a_time_and_a_gpu_many_small_ones(make_batch):
    assert make_batch.steps_at_once == 1

    def steps(size):
        scheme = LabelScheme({"background": 0, "ball": 1})
        sampler = PatchSampler(TwoCases(), ["1"], size, 2, scheme)
        maker = batch_maker(sampler, AugmentationConfig(), seed=3, device="cuda")
        return maker.steps_at_once

    assert steps((8, 8, 8)) == batches.STEPS_AT_ONCE
    assert steps((64, 64, 64)) == 8  # 2 samples of 2 channels: a million numbers
    assert steps((256, 256, 256)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits_again_and_what_the_cpu_gives(make_batch):
    config = AugmentationConfig(p_rotation=0.5, p_noise=0.0)  # noise is the device's
    here = BatchMaker(make_batch.sampler, config, 3, torch.device("cpu"))
    there = BatchMaker(make_batch.sampler, config, 3, torch.device("cuda"))
    assert there.steps_at_once > 1
    with Feed(there, there.device, 0, 8, workers=3) as feed:
        for step in range(8):
            found, again, expected = feed.next(), there(step), here(step)
            assert torch.equal(found.image, again.image)
            assert torch.equal(found.label, again.label)
            image = found.image.cpu()
            torch.testing.assert_close(image, expected.image, atol=5e-3, rtol=1e-3)
            assert (found.label.cpu() == expected.label).float().mean() > 0.99
