"""From the sampler's patches to augmented batches on the training device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from segmamba.config import AugmentationConfig
from segmamba.data.augment import AT_ONCE, Batch, augment
from segmamba.data.draws import step_seed
from segmamba.data.sampler import PatchSampler

STEPS_AT_ONCE = 32
"""At most so many batches are made at once: a resumed run makes some anew."""


def batch_maker(
    sampler: PatchSampler,
    augmentation: AugmentationConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> BatchMaker:
    """Give the function of the step that a `Trainer` draws its batches from.

    Args:
        sampler: Reads patches; best made with `margin=augmentation`.
        augmentation: Random changes, computed on `device`.
        seed: Batches are a function of this and the step.
        device: Where the network trains.

    Returns:
        A function from a step (from 0) to a `Batch` on `device`; threads may call it.
    """
    return BatchMaker(sampler, augmentation, seed, torch.device(device))


@dataclass(frozen=True)
class BatchMaker:
    """Gives the batch of a step; `batch_maker` makes one.

    For a GPU the batches of several steps are made at once, as many as are small
    together: Python takes as long to launch the work on many samples as on one. Which
    steps these are depends on nothing but their numbers, so that a step's batch is a
    function of the seed and the step.
    """

    sampler: PatchSampler
    augmentation: AugmentationConfig
    seed: int
    device: torch.device

    @functools.cached_property
    def steps_at_once(self) -> int:
        """How many steps' batches are made at once, at least 1; 1 on a CPU."""
        if self.device.type == "cpu":
            return 1
        patch = math.prod(self.sampler.patch_size) * self.sampler.channels
        count = AT_ONCE // (patch * self.sampler.batch_size)
        return min(max(count, 1), STEPS_AT_ONCE)

    def __call__(self, step: int) -> Batch:
        """Give the batch of a step (from 0), on the device."""
        block, place = divmod(step, self.steps_at_once)
        return self.block(block)[place]

    def block(self, index: int) -> list[Batch]:
        """Give the batches of a block of `steps_at_once` steps, on the device.

        Args:
            index: Number of the block, from 0.
        """
        sampler, first = self.sampler, index * self.steps_at_once
        steps = range(first, first + self.steps_at_once)
        read = sampler.batches(steps, pin_memory=self.device.type == "cuda")
        seeds = [step_seed(self.seed, step) for step in steps]
        batch = to_device(read, self.device)
        batch = augment(batch, sampler.patch_size, self.augmentation, seeds)
        return batch.split(sampler.batch_size)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device without making the CPU wait."""
    if batch.image.device == device or batch.image.device.type == device.type == "cpu":
        return batch
    if device.type == "cuda" and not batch.image.is_cuda:
        batch = batch.pin_memory()  # does nothing to what is pinned already
    return batch.to(device, non_blocking=device.type == "cuda")
