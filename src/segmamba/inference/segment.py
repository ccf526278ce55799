"""From a preprocessed image to maps on the scan's grid, in the memory that there is."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from segmamba.data.geometry import Geometry
from segmamba.data.preprocess import restore_pieces
from segmamba.data.resample import (
    Rows,
    resample_slabs,
    resample_stream,
    split_rows,
)
from segmamba.devices import describe_out_of_memory, is_out_of_memory, resolve_device
from segmamba.inference.attempts import Attempt, Sizes, attempts
from segmamba.inference.sliding_window import Progress, SlidingWindow
from segmamba.inference.uncertainty import Doubt, Piece, SampledNetwork, Uncertainty
from segmamba.types import Array, Size3

if TYPE_CHECKING:
    from segmamba.inference.predictor import Predictor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmented:
    """What was made of a scan, on its own grid."""

    label_map: Array
    """(I, J, K) integers."""
    probabilities: Array | None
    """float16 (K, I, J, K), if wanted."""
    uncertainty: Uncertainty | None
    """If wanted."""


@dataclass(frozen=True)
class Request:
    """What is wanted of a preprocessed image."""

    image: torch.Tensor
    """(C, D, H, W) float32."""
    geometry: Geometry
    """What undoes its preprocessing."""
    case: str
    """What errors and progress call it."""
    probabilities: bool = False
    uncertainty: bool = False
    progress: Progress | None = None


def segment(predictor: Predictor, wanted: Request) -> Segmented:
    """Segment an image; where memory runs out, try again with less.

    Args:
        predictor: Networks and options.
        wanted: The image, and what is wanted of it.

    Returns:
        The same, whichever way was taken; but windows in place of the whole volume,
        which the log tells.

    Raises:
        RuntimeError: Memory ran out even in the last way. Or another error of torch's.
    """
    ways = list(_ways(predictor, wanted))
    for way, following in zip(ways, [*ways[1:], None], strict=True):
        try:
            return _go(predictor, wanted, way)
        except (RuntimeError, MemoryError) as error:
            if following is None or not is_out_of_memory(error):
                raise
            problem = describe_out_of_memory(error)
        _log.warning(
            "%s: memory ran out (%s); going on with %s",
            *(wanted.case, problem, following.describe()),
        )
        predictor.free_memory()
    raise AssertionError("there is at least one way")


def _ways(predictor: Predictor, wanted: Request) -> Iterator[Attempt]:
    size = cast(Size3, tuple(wanted.image.shape[1:]))
    outputs = predictor.scheme.num_outputs
    sizes = Sizes(
        size,
        2 * outputs + 1 if wanted.uncertainty else outputs,
        predictor.accumulate_dtype.itemsize,
        wanted.image.nbytes,
    )
    target = predictor.accumulate_device
    place = None if target is None else resolve_device(target)
    patch = predictor.plan.patch_size
    if predictor.whole_volume:
        whole = cast(Size3, tuple(map(max, zip(size, patch, strict=True))))
        yield next(attempts(sizes, whole, 1, predictor.device, place))
    yield from attempts(sizes, patch, predictor.batch_size, predictor.device, place)


def _go(predictor: Predictor, wanted: Request, way: Attempt) -> Segmented:
    launch = predictor.launcher
    networks = [launch(network) for network in predictor.networks]
    sampled = doubt = None
    if wanted.uncertainty:
        snapshots = [launch(network) for network in predictor.snapshots]
        sampled = SampledNetwork(
            networks, snapshots, predictor.mirror_axes, predictor.scheme
        )
        doubt = Doubt(
            wanted.geometry, predictor.scheme, sampled, _voxels_ml(wanted.geometry)
        )
    seen = SlidingWindow(
        networks if sampled is None else [sampled],
        way.patch_size,
        predictor.device,
        way.target,
        overlap=predictor.overlap,
        mirror_axes=predictor.mirror_axes if sampled is None else (),
        batch_size=way.batch_size,
        accumulate_dtype=predictor.accumulate_dtype,
        precision=predictor.precision,
        on_windows=None if sampled is None else sampled.expect,
    )
    with evaluating([*predictor.networks, *predictor.snapshots]):
        pieces = _pieces(seen, wanted, way)
        label_map, maps = restore_pieces(
            pieces if doubt is None else doubt.watch(pieces),
            wanted.geometry,
            predictor.scheme,
            return_probabilities=wanted.probabilities,
        )
    return Segmented(label_map, maps, None if doubt is None else doubt.result())


def _pieces(seen: SlidingWindow, wanted: Request, way: Attempt) -> Iterator[Piece]:
    """Give what the networks say on the crop's grid, a piece at a time."""
    # An image beside the sums spares a copy for each window.
    image, shape = wanted.image.to(way.target), wanted.geometry.cropped_shape
    if not way.parts:
        logits = seen.logits(image, wanted.case, wanted.progress)
        for part, piece in resample_slabs(logits, shape):
            yield part, slice(None), piece
        return
    deep, high, _ = image.shape[1:]
    begins = 0
    for rows in split_rows(high, shape[1], way.parts):
        is_last = rows.outer.stop == shape[1]
        counted = slice(begins, high if is_last else rows.inner.stop)
        begins = counted.stop  # neighbours share rows, which count once
        # On a much coarser scan nobody asks for the rows between: they count, too.
        inner = slice(min(rows.inner.start, counted.start), counted.stop)
        taken = Rows(rows.outer, inner)
        slabs = seen.slabs(image, inner, counted, wanted.case, wanted.progress)
        for part, piece in resample_stream(slabs, (deep, high), shape, taken):
            yield part, rows.outer, piece


def _voxels_ml(geometry: Geometry) -> tuple[float, float]:
    """Give the volumes of a voxel of the scan, and of the network's grid.

    The latter are not the plan's: whole numbers of them share the crop's extent.
    """
    matrix = np.asarray(geometry.affine)[:3, :3]
    scan = abs(float(np.linalg.det(matrix))) / 1000
    share = math.prod(geometry.cropped_shape) / math.prod(geometry.shape)
    return scan, scan * share


@contextlib.contextmanager
def evaluating(networks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Switch to evaluation and back: a network may be in the middle of training."""
    modules = [
        module
        for network in networks
        if isinstance(network, nn.Module)
        for module in network.modules()
    ]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
