"""How a scan's windows are summed up, and what is tried where memory runs out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from segmamba.types import Size3

SUMS_BYTES = 2 << 30
"""Sums of logits that take more of the computer's memory are made slab by slab."""

GPU_SHARE = 0.5
"""Share of a GPU's free memory that image and sums of the logits may take."""


@dataclass(frozen=True)
class Attempt:
    """One way to go about a scan."""

    patch_size: Size3
    """Voxels of a window."""
    batch_size: int
    """Windows at once."""
    target: torch.device
    """Where the logits are summed."""
    parts: int = 0
    """0: sums of the whole image; else slab by slab along D, in so many parts of H."""

    def describe(self) -> str:
        """Say in words how it goes."""
        sums = f"sums on {self.target}"
        if self.parts:
            sums += ", slab by slab"
            sums += f" in {self.parts} parts of the plane" if self.parts > 1 else ""
        windows = " x ".join(map(str, self.patch_size))
        return f"{self.batch_size} windows of {windows} at once, {sums}"


@dataclass(frozen=True)
class Sizes:
    """What the memory for a scan's sums depends on."""

    image: Size3
    """Voxels of the preprocessed image."""
    outputs: int
    """Channels that are summed."""
    itemsize: int
    """Bytes of a number."""
    image_bytes: int
    """Of the image, all channels."""

    def sums(self, patch_size: Size3, parts: int) -> int:
        """Give the bytes of the sums: whole (0 parts), or a window deep."""
        deep, high, wide = self.image
        if parts:
            deep, high = min(deep, patch_size[0]), math.ceil(high / parts)
        return self.outputs * deep * high * wide * self.itemsize

    def parts(self, patch_size: Size3, limit: int) -> int:
        """Choose the fewest parts whose sums stay within so many bytes."""
        if self.sums(patch_size, 0) <= limit:
            return 0
        needed = math.ceil(self.sums(patch_size, 1) / limit)
        return min(needed, self.image[1])


def attempts(
    sizes: Sizes,
    patch_size: Size3,
    batch_size: int,
    device: torch.device,
    sums_device: torch.device | None = None,
) -> Iterator[Attempt]:
    """Give the ways to go about a scan, the best one first.

    After the first, each takes less memory than the one before: fewer windows at once,
    then sums on the CPU, then slab by slab in ever smaller parts.

    Args:
        sizes: Of the scan and its sums.
        patch_size: Voxels of a window.
        batch_size: Windows at once.
        device: Where the networks are.
        sums_device: Where the logits are summed; None chooses.

    Yields:
        All give the same logits.
    """
    target, parts = _place(sizes, patch_size, device, sums_device)
    attempt = Attempt(patch_size, batch_size, target, parts)
    yield attempt
    while attempt.batch_size > 1:
        attempt = dataclasses.replace(attempt, batch_size=attempt.batch_size // 2)
        yield attempt
    if target.type != "cpu":
        parts = sizes.parts(patch_size, SUMS_BYTES)
        attempt = dataclasses.replace(attempt, target=torch.device("cpu"), parts=parts)
        yield attempt
    for more in (1, 4, 16):
        if attempt.parts < more <= sizes.image[1]:
            attempt = dataclasses.replace(attempt, parts=more)
            yield attempt


def _place(
    sizes: Sizes,
    patch_size: Size3,
    device: torch.device,
    wanted: torch.device | None,
) -> tuple[torch.device, int]:
    """Choose where the sums are, and in how many parts."""
    target = wanted or device
    if target.type == "cuda" and wanted is None:
        free, _ = torch.cuda.mem_get_info(device)
        room = int(GPU_SHARE * free) - sizes.image_bytes
        for parts in (0, 1):
            if sizes.sums(patch_size, parts) < room:
                return target, parts
        target = torch.device("cpu")
    if target.type == "cpu":
        return target, sizes.parts(patch_size, SUMS_BYTES)
    return target, 0
