"""Change the voxel grid of images, label maps and logits; voxel centres kept right.

All functions map voxel o of n_out to the position (o + 0.5) * n_in / n_out - 0.5 of the
input, so both grids cover the same box in space, and going back is the same formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import scipy
import torch
from torch.nn import functional

from segmamba.data.geometry import nonzero_box
from segmamba.types import Array, Size3, Spacing3

SLAB_BYTES = 64 * 2**20
"""Size of the float32 piece that a slab-wise function works on."""


def resampled_shape(shape: Size3, before_mm: Spacing3, after_mm: Spacing3) -> Size3:
    """Give the number of voxels that keeps the extent at another spacing.

    Args:
        shape: Voxels along three axes.
        before_mm: Voxel distance along them, in mm.
        after_mm: Voxel distance wanted, in mm.

    Returns:
        Voxels along three axes, rounded, 1 at least.
    """
    triples = zip(shape, before_mm, after_mm, strict=True)
    return cast(Size3, tuple(max(1, round(n * a / b)) for n, a, b in triples))


def resample_image(
    image: Array, shape: Size3, method: Literal["linear", "cubic"] = "linear"
) -> Array:
    """Resample each channel of an image.

    Args:
        image: float32 (C, D, H, W).
        shape: Voxels wanted along D, H, W.
        method: "linear", or "cubic" (order-3 spline, about 45 times slower).

    Returns:
        float32 (C, *shape); the input itself if the shape doesn't change.
    """
    if image.shape[1:] == tuple(shape):
        return image
    resample = _resample_cubic if method == "cubic" else _resample_linear
    result = np.empty((len(image), *shape), np.float32)
    for channel, target in zip(image, result, strict=True):
        target[...] = resample(channel, shape)
    return result


def resample_label_map(label_map: Array, shape: Size3) -> Array:
    """Resample a label map: linear weights per label, the heaviest label wins.

    Works only where labels other than 0 are, so memory and time follow their
    bounding box and not the volume.

    Args:
        label_map: Integers (D, H, W).
        shape: Voxels wanted along D, H, W.

    Returns:
        Integers (*shape) of the same type; the lower label wins a tie.
    """
    if label_map.shape == tuple(shape):
        return label_map
    result = np.zeros(shape, label_map.dtype)
    if not label_map.any():
        return result
    box = nonzero_box(label_map[None])
    taps, inner, outer = [], [], []
    for axis, (first, stop) in enumerate(box):
        low, high, weight = _taps(label_map.shape[axis], shape[axis])
        touched = np.flatnonzero((high >= first) & (low < stop))
        if len(touched) == 0:  # lies between the voxels of a much coarser grid
            return result
        start = low[touched[0]]
        inner.append(slice(start, high[touched[-1]] + 1))
        outer.append(slice(touched[0], touched[-1] + 1))
        taps.append((low[touched] - start, high[touched] - start, weight[touched]))
    result[tuple(outer)] = _heaviest_label(label_map[tuple(inner)], taps)
    return result


@dataclass(frozen=True)
class Rows:
    """A part of an output along H, and the part of the input that it is made of."""

    outer: slice
    """Range of the output."""
    inner: slice
    """Range of the input; neighbours share a voxel where the size changes."""


def split_rows(n_in: int, n_out: int, parts: int) -> list[Rows]:
    """Divide an output along H.

    Args:
        n_in: Voxels of the input.
        n_out: Voxels of the output.
        parts: How many, 1 or more; no more come than the output has voxels.

    Returns:
        Parts of nearly one size, in order.
    """
    low, high, _ = _taps(n_in, n_out)
    count = min(parts, n_out)
    ends = [round(index * n_out / count) for index in range(count + 1)]
    return [
        Rows(slice(start, stop), slice(int(low[start]), int(high[stop - 1]) + 1))
        for start, stop in itertools.pairwise(ends)
    ]


def resample_slabs(
    logits: torch.Tensor, shape: Size3, slab_bytes: int = SLAB_BYTES
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Resample channels linearly, a few D-slices at a time.

    Args:
        logits: Floats (K, D, H, W) of any type and device.
        shape: Voxels wanted along D, H, W.
        slab_bytes: Largest float32 piece; a single slice may exceed it.

    Yields:
        The slice along the new D, and float32 (K, length, H, W) for it, on the
        device of `logits`. Never more than three such pieces exist beside them.
    """
    depth, rows, _ = logits.shape[1:]
    whole = Rows(slice(0, shape[1]), slice(0, rows))
    slabs = [(slice(0, depth), logits)]
    yield from resample_stream(slabs, (depth, rows), shape, whole, slab_bytes)


def resample_stream(
    slabs: Iterable[tuple[slice, torch.Tensor]],
    size: tuple[int, int],
    shape: Size3,
    rows: Rows,
    slab_bytes: int = SLAB_BYTES,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Resample channels linearly that come from front to back along D.

    Args:
        slabs: Ranges along D that join, and floats (K, length, rows.inner, W).
        size: Voxels of the whole input along D and H.
        shape: Voxels of the whole output along D, H, W.
        rows: The part along H.
        slab_bytes: Largest float32 piece; a single slice may exceed it.

    Yields:
        The slice along the new D, and float32 (K, length, rows.outer, W) for it.
        Beside the slab, a slice of it and three such pieces exist at most.
    """
    low, high, _ = _taps(size[0], shape[0])
    done, last = 0, None  # outputs so far, and the last slice of the slab before
    for part, slab in slabs:
        between = int(np.searchsorted(low, part.start))  # those that need `last` too
        ready = int(np.searchsorted(high, part.stop))
        if last is not None and between > done:
            pair, begins = torch.cat([last, slab[:, :1]], dim=1), part.start - 1
            yield from _pieces(
                pair, begins, slice(done, between), size, shape, rows, slab_bytes
            )
        wanted = slice(max(done, between), ready)
        yield from _pieces(slab, part.start, wanted, size, shape, rows, slab_bytes)
        done, last = max(done, between, ready), slab[:, -1:].clone()


def _pieces(
    slab: torch.Tensor,
    begins: int,
    outputs: slice,
    size: tuple[int, int],
    shape: Size3,
    rows: Rows,
    slab_bytes: int,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Make some of the outputs, of a slab that begins at a voxel along D."""
    low, high, weight = _taps(size[0], shape[0])
    height = rows.outer.stop - rows.outer.start
    length = max(1, slab_bytes // (4 * len(slab) * height * shape[2]))
    for start in range(outputs.start, outputs.stop, length):
        part = slice(start, min(outputs.stop, start + length))
        piece = _blend(slab, 1, low[part] - begins, high[part] - begins, weight[part])
        yield part, _in_plane(piece, size[1], shape, rows)


def _in_plane(piece: torch.Tensor, n_in: int, shape: Size3, rows: Rows) -> torch.Tensor:
    """Resample (K, length, rows.inner, W) along H and W."""
    outer = rows.outer
    is_whole = (piece.shape[2], outer.stop - outer.start) == (n_in, shape[1])
    if not is_whole and n_in != shape[1]:
        low, high, weight = (taps[outer] for taps in _taps(n_in, shape[1]))
        piece = _blend(
            piece, 2, low - rows.inner.start, high - rows.inner.start, weight
        )
    wanted = (outer.stop - outer.start, shape[2])
    if piece.shape[2:] == wanted:
        return piece
    return functional.interpolate(
        piece, size=wanted, mode="bilinear", align_corners=False
    )


def _resample_linear(channel: Array, shape: Size3) -> Array:
    tensor = torch.from_numpy(np.ascontiguousarray(channel, np.float32))[None, None]
    resized = functional.interpolate(
        tensor, size=tuple(shape), mode="trilinear", align_corners=False
    )
    return resized[0, 0].numpy()


def _resample_cubic(channel: Array, shape: Size3) -> Array:
    factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
    zoomed = scipy.ndimage.zoom(
        channel, factors, order=3, mode="nearest", grid_mode=True
    )
    return np.asarray(zoomed)


def _taps(n_in: int, n_out: int) -> tuple[Array, Array, Array]:
    """Both neighbours of each output voxel, and the weight of the upper one."""
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    position = np.clip(position, 0, n_in - 1)
    low = np.floor(position).astype(np.int64)
    weight = (position - low).astype(np.float32)
    # A neighbour of weight 0 isn't touched: that keeps boxes tight.
    high = np.where(weight > 0, np.minimum(low + 1, n_in - 1), low)
    return low, high, weight


def _blend(
    tensor: torch.Tensor, axis: int, low: Array, high: Array, weight: Array
) -> torch.Tensor:
    device = tensor.device
    lower = tensor.index_select(axis, torch.as_tensor(low, device=device)).float()
    if not weight.any():
        return lower
    upper = tensor.index_select(axis, torch.as_tensor(high, device=device)).float()
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return lower.lerp_(upper, torch.as_tensor(weight, device=device).reshape(shape))


def _heaviest_label(box: Array, taps: list[tuple[Array, Array, Array]]) -> Array:
    best, winner = None, None
    for value in np.unique(box):  # ascending, so the lower one keeps a tie
        share = torch.from_numpy((box == value).astype(np.float32))
        for axis, (low, high, weight) in enumerate(taps):
            share = _blend(share, axis, low, high, weight)
        share = share.numpy()
        if best is None or winner is None:
            best, winner = share, np.full(share.shape, value, box.dtype)
            continue
        wins = share > best
        winner[wins] = value
        np.maximum(best, share, out=best)
    assert winner is not None
    return winner
