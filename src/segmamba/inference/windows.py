"""Where the windows of an image lie, how they are weighed, and their sums.

Windows are laid evenly over each axis and weighed by Gaussians. The weights are a
product of one vector an axis, and so is their sum over all windows; hence each window
is weighted by its final share at once, and no map of summed weights is held. An axis
shorter than the window is padded with zeros, at both ends, inside the window only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F

from segmamba.types import Size3

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of a window's weights, as a share of its side. Source: nnU-Net
(Isensee et al. 2021, doi 10.1038/s41592-020-01008-z)."""

Window: TypeAlias = tuple[int, ...]
"""Its number along D, H, W."""


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


@dataclass(frozen=True)
class Axis:
    """Windows along one axis."""

    starts: tuple[int, ...]
    """First voxel of each."""
    length: int
    """Voxels of the image in a window: less than its side if it is padded."""
    before: int
    """Zeros in front."""
    after: int
    """Zeros behind."""
    shares: tuple[torch.Tensor, ...]
    """Of each window, (length,); they sum to 1 at a voxel."""

    @classmethod
    def make(
        cls, size: int, patch: int, overlap: float, gaussian: bool, device: torch.device
    ) -> Axis:
        """Lay windows over an axis and weigh them."""
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

    @property
    def inner(self) -> slice:
        """The image's voxels in a padded window."""
        return slice(self.before, self.before + self.length)

    def span(self, index: int) -> slice:
        """A window's voxels in the image."""
        return slice(self.starts[index], self.starts[index] + self.length)


@dataclass(frozen=True)
class Layout:
    """Windows over an image (D, H, W)."""

    size: Size3
    """Voxels of the image."""
    axes: tuple[Axis, ...]
    """Along D, H and W."""

    @classmethod
    def make(
        cls,
        size: Size3,
        patch_size: Size3,
        overlap: float,
        gaussian: bool,
        device: torch.device,
    ) -> Layout:
        """Lay windows over an image and weigh them.

        Args:
            size: Voxels of the image.
            patch_size: Voxels of a window.
            overlap: Share of a side that neighbours have in common.
            gaussian: Weigh by a Gaussian; False weighs all voxels alike.
            device: Where the weights are.

        Returns:
            The layout.
        """
        sides = zip(size, patch_size, strict=True)
        axes = (Axis.make(n, p, overlap, gaussian, device) for n, p in sides)
        return cls(size, tuple(axes))

    @property
    def is_single(self) -> bool:
        """Whether one window holds the whole image."""
        return all(len(axis.starts) == 1 for axis in self.axes)

    @property
    def inner(self) -> tuple[slice, ...]:
        """The image's voxels in a padded window."""
        return tuple(axis.inner for axis in self.axes)

    def windows(self, rows: slice) -> list[Window]:
        """List windows from front to back.

        Args:
            rows: Range along H; windows that miss it are left out.

        Returns:
            Their numbers, those along W running fastest.
        """
        deep, high, wide = (range(len(axis.starts)) for axis in self.axes)
        spans = [self.axes[1].span(index) for index in high]
        touched = [i for i in high if _overlap(spans[i], rows) is not None]
        return list(itertools.product(deep, touched, wide))

    def cut(self, image: torch.Tensor, window: Window) -> torch.Tensor:
        """Cut a window out, (C, *patch), zeros around it where the image is smaller."""
        pairs = zip(self.axes, window, strict=True)
        part = image[(slice(None), *(axis.span(i) for axis, i in pairs))]
        padding = [n for axis in reversed(self.axes) for n in (axis.before, axis.after)]
        return F.pad(part, padding) if any(padding) else part

    def shares(self, window: Window) -> torch.Tensor:
        """Give the weights of a window's image voxels, all windows' together 1."""
        pairs = zip(self.axes, window, strict=True)
        d, h, w = (axis.shares[i] for axis, i in pairs)
        return d[:, None, None] * h[:, None] * w

    def padded_shares(self, window: Window, rows: slice) -> torch.Tensor:
        """Give the same for a whole window, 0 where it is padded or outside `rows`."""
        shares, first = self.shares(window), self.axes[1].starts[window[1]]
        shares[:, : max(rows.start - first, 0)] = 0
        shares[:, max(rows.stop - first, 0) :] = 0
        padding = [n for axis in reversed(self.axes) for n in (axis.before, axis.after)]
        return F.pad(shares, padding)


@dataclass
class Sums:
    """The weighted logits of the windows seen so far, of a box of the image.

    The box takes in all of W, `rows` of H, and `depth` voxels of D, from where on it
    moves along: `pop` gives what no later window adds to, and makes room.
    """

    layout: Layout
    depth: int
    """Voxels along D that are held."""
    rows: slice
    """Range along H."""
    device: torch.device
    dtype: torch.dtype
    _first: int = 0  # where the box is along D
    _popped: int = 0  # voxels of it that aren't wanted any more
    _total: torch.Tensor | None = field(default=None, repr=False)

    def add(self, windows: Sequence[Window], logits: torch.Tensor) -> None:
        """Add the logits (B, K, *patch) of B windows, in the part that is held."""
        if self._is_whole and self.layout.is_single:
            inner = (0, slice(None), *self.layout.inner)
            self._total = logits[inner].to(self.device, self.dtype)
            return
        if self._total is None:
            high = self.rows.stop - self.rows.start
            shape = (logits.shape[1], self.depth, high, self.layout.size[2])
            self._total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self._popped:
            self._make_room(self._total)
        for window, part in zip(windows, logits, strict=True):
            self._add_one(self._total, window, part)

    def pop(self, stop: int) -> tuple[slice, torch.Tensor]:
        """Give the sums from where the last call ended, and forget those before.

        Args:
            stop: Behind the last voxel along D to which no window is left to add.

        Returns:
            Its range along D, and (K, length, rows, W), a view that is valid until the
            next windows are added.
        """
        assert self._total is not None
        self._popped = stop - self._first
        return slice(self._first, stop), self._total[:, : self._popped]

    def _make_room(self, total: torch.Tensor) -> None:
        """Move the box along D, behind what was popped."""
        by, rest = self._popped, self.depth - self._popped
        for start in range(0, rest, by):  # pieces that don't overlap where they go
            stop = min(start + by, rest)
            total[:, start:stop] = total[:, start + by : stop + by]
        total[:, max(rest, 0) :] = 0
        self._first, self._popped = self._first + by, 0

    @property
    def _is_whole(self) -> bool:
        return (self.depth, self.rows.stop - self.rows.start) == self.layout.size[:2]

    def _add_one(self, total: torch.Tensor, window: Window, part: torch.Tensor) -> None:
        weighted = part[(slice(None), *self.layout.inner)] * self.layout.shares(window)
        deep, high, wide = (
            axis.span(i) for axis, i in zip(self.layout.axes, window, strict=True)
        )
        rows = _overlap(high, self.rows)
        assert rows is not None
        weighted = weighted[:, :, rows.start - high.start : rows.stop - high.start]
        deep = slice(deep.start - self._first, deep.stop - self._first)
        rows = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        total[:, deep, rows, wide] += weighted.to(total.device, total.dtype)


def by_depth(windows: Sequence[Window]) -> Iterator[tuple[int, list[Window]]]:
    """Group windows by their number along D."""
    for index, group in itertools.groupby(windows, key=lambda window: window[0]):
        yield index, list(group)


def chunks(
    windows: Sequence[Window], size: int
) -> Iterator[tuple[int, Sequence[Window]]]:
    """Give so many windows at a time, with the number of all up to there."""
    for first in range(0, len(windows), size):
        chunk = windows[first : first + size]
        yield first + len(chunk), chunk


def _overlap(first: slice, second: slice) -> slice | None:
    start = max(first.start, second.start)
    stop = min(first.stop, second.stop)
    return slice(start, stop) if start < stop else None
