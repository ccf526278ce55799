"""Batches are a function of the seed and the step, whatever happens in between."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segmamba.config import AugmentationConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.sampler import PatchSampler
from segmamba.training import batch_maker
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
    with Prefetcher(make_batch, 4, 10, workers=3) as batches:
        ahead = list(batches)
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
