"""Logits of a whole image from overlapping windows, in bounded memory.

Mirrorings and networks are averaged plainly, windows by the weights of their layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from segmamba.devices import autocast, precision_for
from segmamba.errors import ConfigError, GeometryError, SegMambaError, describe
from segmamba.inference.windows import Layout, Sums, Window, by_depth, chunks
from segmamba.inference.windows import gaussian_weights as gaussian_weights
from segmamba.inference.windows import num_windows as num_windows
from segmamba.inference.windows import window_starts as window_starts
from segmamba.types import Size3

Network = Callable[[torch.Tensor], Any]
"""(B, C, D, H, W) to logits (B, K, D, H, W), or to a list that starts with them."""

Progress = Callable[[int, int, str], None]
"""Called with what is done, of how many, and what it is."""


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
    seen = SlidingWindow(
        [networks] if callable(networks) else list(networks),
        patch_size,
        torch.device(device),
        torch.device(accumulate_device or device),
        overlap=overlap,
        mirror_axes=mirror_axes,
        batch_size=batch_size,
        accumulate_dtype=accumulate_dtype,
        precision=precision,
        gaussian=gaussian,
    )
    return seen.logits(image, case, progress)


@dataclass(frozen=True)
class SlidingWindow:
    """How networks see an image; the fields are `sliding_window_logits`' arguments."""

    networks: list[Network]
    patch_size: Size3
    device: torch.device
    accumulate_device: torch.device
    overlap: float = 0.5
    mirror_axes: Sequence[int] = (0, 1, 2)
    batch_size: int = 1
    accumulate_dtype: torch.dtype = torch.float32
    precision: str = "auto"
    gaussian: bool = True
    on_windows: Callable[[torch.Tensor], None] | None = None
    """Called before each batch with the weights of its windows, (B, *patch), which add
    up to 1 at each voxel of the image; zero where a window is padded."""

    def logits(
        self, image: torch.Tensor, case: str, progress: Progress | None = None
    ) -> torch.Tensor:
        """Give the logits of a whole image (K, D, H, W)."""
        whole = slice(0, image.shape[2])
        slabs = self._slabs(image, whole, whole, image.shape[1], case, progress)
        return next(iter(slabs))[1].contiguous()

    def slabs(
        self,
        image: torch.Tensor,
        rows: slice,
        counted: slice,
        case: str = "the image",
        progress: Progress | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Give the logits of an image from front to back, as windows get done.

        Only as many voxels along D as a window has are held, of `rows` only. Windows
        on the border of `rows` are computed for both sides of it.

        Args:
            image: (C, D, H, W).
            rows: Range along H.
            counted: Range along H for `on_windows`; weights outside of it are 0.
            case: Named in errors and progress.
            progress: Called with windows done and their number.

        Yields:
            A range along D, and its logits (K, length, rows, W), valid until the next.
        """
        depth = min(image.shape[1], self.patch_size[0])
        return self._slabs(image, rows, counted, depth, case, progress)

    @torch.inference_mode()
    def _slabs(
        self,
        image: torch.Tensor,
        rows: slice,
        counted: slice,
        depth: int,
        case: str,
        progress: Progress | None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        layout = self._layout(image)
        run = self._run(case)
        target, dtype = self.accumulate_device, self.accumulate_dtype
        sums = Sums(layout, depth, rows, target, dtype)
        windows, done = layout.windows(rows), 0
        whole = depth == image.shape[1]
        groups = [(-1, windows)] if whole else by_depth(windows)
        ends = [*layout.axes[0].starts[1:], image.shape[1]]
        for index, group in groups:
            for count, chunk in chunks(group, self.batch_size):
                self._announce(layout, chunk, counted)
                batch = torch.stack([layout.cut(image, window) for window in chunk])
                sums.add(chunk, run(batch))
                if progress is not None:
                    progress(done + count, len(windows), case)
            done += len(group)
            yield sums.pop(ends[index])

    def _layout(self, image: torch.Tensor) -> Layout:
        _check(self, image)
        d, h, w = image.shape[1:]
        return Layout.make(
            (d, h, w), self.patch_size, self.overlap, self.gaussian, self.device
        )

    def _run(self, case: str) -> _Run:
        chosen = precision_for(self.device, self.precision)
        flips = combinations(self.mirror_axes)
        return _Run(self.networks, flips, self.device, chosen, case)

    def _announce(
        self, layout: Layout, windows: Sequence[Window], counted: slice
    ) -> None:
        if self.on_windows is not None:
            shares = [layout.padded_shares(window, counted) for window in windows]
            self.on_windows(torch.stack(shares))


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


def combinations(mirror_axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Give all mirrorings along some axes, none at all first.

    Args:
        mirror_axes: Of (D, H, W).

    Returns:
        Axes of (B, C, D, H, W) to flip.
    """
    axes = sorted({axis + 2 for axis in mirror_axes})
    counts = range(len(axes) + 1)
    return [flip for n in counts for flip in itertools.combinations(axes, n)]


def _check(seen: SlidingWindow, image: torch.Tensor) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise GeometryError(
            describe(
                "bad image shape",
                expected="(C, D, H, W), none of them zero",
                found=tuple(image.shape),
            )
        )
    patch, overlap, axes = seen.patch_size, seen.overlap, seen.mirror_axes
    _require(bool(seen.networks), "no network", "one or more", len(seen.networks))
    sides = len(patch) == 3 and min(patch) >= 1
    _require(sides, "bad patch size", "three positive sizes", patch)
    _require(0 <= overlap < 1, "bad overlap", "0 to below 1", overlap)
    known = set(axes) <= {0, 1, 2}
    _require(known, "bad mirror axes", "some of 0, 1, 2", tuple(axes))
    _require(seen.batch_size >= 1, "bad batch size", "1 or more", seen.batch_size)


def _require(right: bool, problem: str, expected: str, found: object) -> None:
    if not right:
        raise ConfigError(describe(problem, expected=expected, found=found))
