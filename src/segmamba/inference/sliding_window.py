"""Logits of a whole image from overlapping windows, in bounded memory.

Windows are laid evenly over each axis. Mirrorings and networks are averaged plainly,
windows by Gaussian weights. The weights are a product of one vector an axis, and so is
their sum over all windows; hence each window is weighted by its final share at once,
and no map of summed weights is held. An axis shorter than the window is padded with
zeros, at both ends, inside the window only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from segmamba.devices import autocast, precision_for
from segmamba.errors import ConfigError, GeometryError, SegMambaError, describe
from segmamba.types import Size3

Network = Callable[[torch.Tensor], Any]
"""(B, C, D, H, W) to logits (B, K, D, H, W), or to a list that starts with them."""

Progress = Callable[[int, int, str], None]
"""Called with what is done, of how many, and what it is."""

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of a window's weights, as a share of its side. Source: nnU-Net
(Isensee et al. 2021, doi 10.1038/s41592-020-01008-z)."""


@torch.inference_mode()
def sliding_window_logits(
    networks: Network | Sequence[Network],
    image: torch.Tensor,
    patch_size: Size3,
    *,
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (0, 1, 2),
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    accumulate_device: torch.device | str | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    precision: str = "auto",
    gaussian: bool = True,
    case: str = "the image",
    progress: Progress | None = None,
) -> torch.Tensor:
    """Run networks over overlapping windows and average their logits.

    Memory, besides the image (which stays where it is) and what a network's own
    forward pass takes, is at most `memory_bound_mib`.

    Args:
        networks: One network or several (folds): (B, C, *patch) to (B, K, *patch).
        image: (C, D, H, W), float, any device; any sizes from 1.
        patch_size: Voxels of a window along D, H, W.
        overlap: Share of a window's side that neighbours have in common, 0 to below 1.
        mirror_axes: Axes of (D, H, W) to mirror, in all combinations; empty for none.
        batch_size: Windows in a forward pass.
        device: Where the networks are.
        accumulate_device: Where the sums are held; None takes `device`.
        accumulate_dtype: Type of the sums: float32, or float16 where memory is short.
        precision: "auto", "fp32", "bf16" or "fp16" for the networks' computation.
        gaussian: Weigh windows by a Gaussian; False weighs all their voxels alike.
        case: Named in errors and progress.
        progress: Called after each batch with windows done and their number.

    Returns:
        Logits (K, D, H, W) of type `accumulate_dtype` on `accumulate_device`.

    Raises:
        ConfigError: An option is out of range.
        GeometryError: The image or a network's answer has the wrong shape.
        SegMambaError: Logits aren't finite.
    """
    group = [networks] if callable(networks) else list(networks)
    axes = _check(group, image, patch_size, overlap, mirror_axes, batch_size)
    device = torch.device(device)
    chosen = precision_for(device, precision)
    run = _Run(group, _combinations(mirror_axes), device, chosen, case)
    grids = [_Axis.make(n, p, overlap, gaussian, device) for n, p in axes]
    target = torch.device(accumulate_device or device)
    sums = _Sums(grids, image.shape[1:], target, accumulate_dtype)
    windows = list(itertools.product(*(range(len(grid.starts)) for grid in grids)))
    for done, chunk in _chunks(windows, batch_size):
        logits = run(torch.stack([_cut(image, grids, window) for window in chunk]))
        sums.add(chunk, logits)
        if progress is not None:
            progress(done, len(windows), case)
    return sums.result()


def window_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """Lay windows evenly over an axis.

    Args:
        size: Voxels of the axis.
        patch: Voxels of a window.
        overlap: Share of a window that neighbours have in common at least, [0, 1).

    Returns:
        First voxel of each window, ascending; the last window ends with the axis. An
        axis no longer than the window has the single start 0. Source: nnU-Net's rule,
        ceil((size - patch) / (patch·(1 - overlap))) + 1 windows, evenly spread.
    """
    if size <= patch:
        return (0,)
    step = max(patch * (1 - overlap), 1.0)
    count = math.ceil((size - patch) / step - 1e-9) + 1
    return tuple(round(i * (size - patch) / (count - 1)) for i in range(count))


def gaussian_weights(patch: int) -> torch.Tensor:
    """Give the weights of a window along one axis; a window's are their product.

    Args:
        patch: Voxels of the window's side.

    Returns:
        (patch,) float32, symmetric, highest in the middle and 1 there for odd sides,
        never zero (3e-4 or more): exp(-(i - centre)² / (2·(patch/8)²)).
    """
    distance = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (patch * GAUSSIAN_SIGMA)) ** 2).float()


def num_windows(size: Size3, patch_size: Size3, overlap: float = 0.5) -> int:
    """Count the windows that cover an image of `size` voxels."""
    pairs = zip(size, patch_size, strict=True)
    return math.prod(len(window_starts(n, p, overlap)) for n, p in pairs)


def memory_bound_mib(
    size: Size3,
    patch_size: Size3,
    *,
    in_channels: int,
    outputs: int,
    batch_size: int = 1,
    accumulate_dtype: torch.dtype = torch.float32,
) -> float:
    """Bound the memory of `sliding_window_logits`, the network's own part left out.

    Args:
        size: Voxels of the image along D, H, W.
        patch_size: Voxels of a window.
        in_channels: Channels C of the image.
        outputs: Channels K of the logits.
        batch_size: Windows B in a forward pass.
        accumulate_dtype: Type of the sums.

    Returns:
        (K·D·H·W·a + 4·B·P·(2·C + 4·K) + 4·P) / 2^20 MiB, with a the bytes of the sums'
        type and P the voxels of a window: the sums; the batch and its mirror image;
        a network's logits, their mirror image, the sum over mirrorings and a weighted
        copy of it; a window's weights.
    """
    patch = math.prod(patch_size)
    sums = outputs * math.prod(size) * accumulate_dtype.itemsize
    windows = 4 * batch_size * patch * (2 * in_channels + 4 * outputs)
    return (sums + windows + 4 * patch) / 2**20


@dataclass(frozen=True)
class _Axis:
    """Windows along one axis."""

    starts: tuple[int, ...]
    length: int  # voxels of the image in a window: less than its side if it is padded
    before: int  # zeros in front
    after: int  # zeros behind
    shares: tuple[torch.Tensor, ...]  # of each window, (length,); sum to 1 at a voxel

    @property
    def inner(self) -> slice:
        """The image's voxels in a padded window."""
        return slice(self.before, self.before + self.length)

    @classmethod
    def make(
        cls, size: int, patch: int, overlap: float, gaussian: bool, device: torch.device
    ) -> _Axis:
        starts = window_starts(size, patch, overlap)
        length, missing = min(size, patch), max(patch - size, 0)
        weights = gaussian_weights(patch) if gaussian else torch.ones(patch)
        weights = weights[missing // 2 : missing // 2 + length]
        sums = torch.zeros(size)
        for start in starts:
            sums[start : start + length] += weights
        shares = [weights / sums[start : start + length] for start in starts]
        shares = tuple(share.to(device) for share in shares)  # a GPU waits for copies
        return cls(starts, length, missing // 2, missing - missing // 2, shares)


@dataclass
class _Sums:
    """The weighted logits of the windows seen so far, (K, D, H, W)."""

    grids: list[_Axis]
    size: Sequence[int]
    device: torch.device
    dtype: torch.dtype
    _total: torch.Tensor | None = None

    def add(self, windows: list[tuple[int, ...]], logits: torch.Tensor) -> None:
        """Add the logits (B, K, *patch) of B windows."""
        if all(len(grid.starts) == 1 for grid in self.grids):  # all is in one window
            inner = (0, slice(None), *(grid.inner for grid in self.grids))
            self._total = logits[inner].to(self.device, self.dtype)
            return
        if self._total is None:
            shape = (logits.shape[1], *self.size)
            self._total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for window, part in zip(windows, logits, strict=True):
            self._add_one(self._total, window, part)

    def result(self) -> torch.Tensor:
        assert self._total is not None
        return self._total.contiguous()

    def _add_one(
        self, total: torch.Tensor, window: tuple[int, ...], part: torch.Tensor
    ) -> None:
        pairs = list(zip(self.grids, window, strict=True))
        d, h, w = (grid.shares[i] for grid, i in pairs)
        part = part[(slice(None), *(grid.inner for grid in self.grids))]
        weighted = part * (d[:, None, None] * h[:, None] * w)
        spans = [slice(g.starts[i], g.starts[i] + g.length) for g, i in pairs]
        total[(slice(None), *spans)] += weighted.to(total.device, total.dtype)


@dataclass(frozen=True)
class _Run:
    """The mean logits of networks and mirrorings for a batch of windows."""

    networks: list[Network]
    flips: list[tuple[int, ...]]
    device: torch.device
    precision: str
    case: str

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self.device, torch.float32, non_blocking=True)
        total: torch.Tensor | None = None
        for flip in self.flips:
            mirrored = batch.flip(flip) if flip else batch
            for network in self.networks:
                total = self._add(total, self._forward(network, mirrored), flip)
        assert total is not None
        count = len(self.flips) * len(self.networks)
        total = total.div_(count) if count > 1 else total
        self._require_finite(total, batch)
        return total

    def _forward(self, network: Network, batch: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            answer = network(batch)
        # Deep supervision: the full resolution comes first.
        logits = answer[0] if isinstance(answer, (list, tuple)) else answer
        if logits.ndim != 5 or logits.shape[2:] != batch.shape[2:]:
            raise GeometryError(
                describe(
                    "a network's answer doesn't fit its window",
                    expected=f"(B, K, {', '.join(map(str, batch.shape[2:]))})",
                    found=tuple(logits.shape),
                )
            )
        return logits

    def _add(
        self, total: torch.Tensor | None, logits: torch.Tensor, flip: tuple[int, ...]
    ) -> torch.Tensor:
        logits = logits.flip(flip) if flip else logits
        if total is None:
            # A network may give back its input or a buffer: sums go into a copy.
            return logits.float() if logits.dtype != torch.float32 else logits.clone()
        return total.add_(logits)

    def _require_finite(self, logits: torch.Tensor, batch: torch.Tensor) -> None:
        if _is_finite(logits):
            return
        if not _is_finite(batch):
            cause, remedy = "the image holds NaN or infinity", "Repair the scan."
        elif self.precision == "fp16":
            cause = "a number outgrew fp16"
            remedy = "Use the precision fp32 or bf16."
        else:
            cause, remedy = "the network's weights make them", "Train the model anew."
        raise SegMambaError(
            describe(f"logits of {self.case} are not finite ({cause})", remedy=remedy)
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes carry NaN along, and need no copy as large as the tensor.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _combinations(mirror_axes: Sequence[int]) -> list[tuple[int, ...]]:
    axes = sorted({axis + 2 for axis in mirror_axes})
    counts = range(len(axes) + 1)
    return [flip for n in counts for flip in itertools.combinations(axes, n)]


def _chunks(
    windows: list[tuple[int, ...]], size: int
) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Give so many windows at a time, with the number of all up to there."""
    for first in range(0, len(windows), size):
        chunk = windows[first : first + size]
        yield first + len(chunk), chunk


def _cut(
    image: torch.Tensor, grids: list[_Axis], window: tuple[int, ...]
) -> torch.Tensor:
    """Cut a window out, (C, *patch), zeros around it where the image is smaller."""
    spans = [
        slice(grid.starts[i], grid.starts[i] + grid.length)
        for grid, i in zip(grids, window, strict=True)
    ]
    part = image[(slice(None), *spans)]
    padding = [n for grid in reversed(grids) for n in (grid.before, grid.after)]
    return F.pad(part, padding) if any(padding) else part


def _check(
    networks: Sequence[Network],
    image: torch.Tensor,
    patch_size: Size3,
    overlap: float,
    mirror_axes: Sequence[int],
    batch_size: int,
) -> list[tuple[int, int]]:
    if image.ndim != 4 or 0 in image.shape:
        raise GeometryError(
            describe(
                "bad image shape",
                expected="(C, D, H, W), none of them zero",
                found=tuple(image.shape),
            )
        )
    _require(bool(networks), "no network", "one or more", len(networks))
    sides = len(patch_size) == 3 and min(patch_size) >= 1
    _require(sides, "bad patch size", "three positive sizes", patch_size)
    _require(0 <= overlap < 1, "bad overlap", "0 to below 1", overlap)
    known = set(mirror_axes) <= {0, 1, 2}
    _require(known, "bad mirror axes", "some of 0, 1, 2", tuple(mirror_axes))
    _require(batch_size >= 1, "bad batch size", "1 or more", batch_size)
    return list(zip(image.shape[1:], patch_size, strict=True))


def _require(right: bool, problem: str, expected: str, found: object) -> None:
    if not right:
        raise ConfigError(describe(problem, expected=expected, found=found))
