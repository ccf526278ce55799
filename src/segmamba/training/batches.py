"""From the sampler's patches to augmented batches on the training device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from segmamba.config import AugmentationConfig
from segmamba.data.augment import Batch, augment, generator
from segmamba.data.sampler import PatchSampler

_AUGMENTATION = 2  # sets these random numbers apart from the sampler's


def batch_maker(
    sampler: PatchSampler,
    augmentation: AugmentationConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Callable[[int], Batch]:
    """Give the function of the step that a `Trainer` draws its batches from.

    Args:
        sampler: Reads patches; best made with `margin=augmentation`.
        augmentation: Random changes, computed on `device`.
        seed: Batches are a function of this and the step.
        device: Where the network trains.

    Returns:
        A function from a step (from 0) to a `Batch` on `device`; threads may call it.
    """
    device = torch.device(device)

    def make_batch(step: int) -> Batch:
        read = sampler.batch(step, pin_memory=device.type == "cuda")
        batch = to_device(read, device)
        step_seed = int(generator(seed, step, _AUGMENTATION).integers(2**62))
        return augment(batch, sampler.patch_size, augmentation, step_seed)

    return make_batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device without making the CPU wait."""
    if batch.image.device == device or batch.image.device.type == device.type == "cpu":
        return batch
    if device.type == "cuda" and not batch.image.is_cuda:
        batch = batch.pin_memory()  # does nothing to what is pinned already
    return batch.to(device, non_blocking=device.type == "cuda")
