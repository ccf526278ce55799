"""From a scan to what the network sees, and from logits back to the scan's grid."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast, overload

import numpy as np
import torch

from segmamba.data.geometry import (
    Box,
    Geometry,
    axis_codes,
    axis_transform,
    nonzero_box,
    orient_array,
)
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.data.resample import (
    resample_image,
    resample_label_map,
    resample_slabs,
    resampled_shape,
)
from segmamba.errors import ConfigError, FormatError, GeometryError, describe
from segmamba.io.volume import Volume
from segmamba.types import Array, Spacing3


def preprocess_image(volume: Volume, plan: Plan) -> tuple[Array, Geometry]:
    """Orient, crop, normalise and resample a scan as the plan says.

    Args:
        volume: The scan, all channels, (C, I, J, K).
        plan: The plan; its `normalization` has one entry per channel.

    Returns:
        float32 (C, D, H, W), C-contiguous, and the geometry that undoes it.

    Raises:
        ConfigError: The number of channels isn't the plan's.
        FormatError: Voxels are NaN or infinite.
    """
    _check_channels(volume, plan)
    order, flips = axis_transform(axis_codes(volume.affine), plan.orientation)
    oriented = orient_array(volume.array, order, flips)
    box = _crop_box(oriented, plan.crop_to_nonzero)
    cropped = oriented[(slice(None), *(slice(start, stop) for start, stop in box))]
    spacing = cast(Spacing3, tuple(volume.spacing_mm[axis] for axis in order))
    shape = resampled_shape(cropped.shape[1:], spacing, plan.spacing_mm)
    image = np.empty((len(cropped), *shape), np.float32)
    for channel, (source, rule) in enumerate(
        zip(cropped, plan.normalization, strict=True)
    ):
        normalized = normalize_channel(_finite(source, volume), rule)
        image[channel] = resample_image(normalized[None], shape, plan.resampling)[0]
    affine = tuple(tuple(float(x) for x in row) for row in np.asarray(volume.affine))
    geometry = Geometry(volume.shape, cast("tuple", affine), order, flips, box, shape)
    return image, geometry


def preprocess_label(
    label_map: Array,
    geometry: Geometry,
    scheme: LabelScheme,
    *,
    file: Path | None = None,
) -> Array:
    """Bring a label map onto the grid of its preprocessed image.

    Args:
        label_map: The file's integers (I, J, K); whole numbers stored as floats too.
        geometry: What `preprocess_image` gave for the image.
        scheme: What the integers mean.
        file: Where the label map came from, for error texts.

    Returns:
        int16 (D, H, W): the data set's own integers, the ignore label kept.

    Raises:
        GeometryError: The label map hasn't the image's shape.
        FormatError: A value isn't a whole number or isn't in the scheme.
    """
    if label_map.shape != geometry.original_shape:
        raise GeometryError(
            describe(
                "image and label map differ in shape",
                expected=geometry.original_shape,
                found=label_map.shape,
                file=file,
            )
        )
    _check_values(label_map, scheme, file)
    oriented = geometry.orient(label_map)[geometry.crop_slices]
    integers = np.ascontiguousarray(oriented).astype(np.int16, copy=False)
    return resample_label_map(integers, geometry.shape)


@overload
def restore_label_map(
    logits: Array | torch.Tensor,
    geometry: Geometry,
    scheme: LabelScheme,
    *,
    return_probabilities: Literal[False] = False,
) -> Array: ...


@overload
def restore_label_map(
    logits: Array | torch.Tensor,
    geometry: Geometry,
    scheme: LabelScheme,
    *,
    return_probabilities: Literal[True],
) -> tuple[Array, Array]: ...


def restore_label_map(
    logits: Array | torch.Tensor,
    geometry: Geometry,
    scheme: LabelScheme,
    *,
    return_probabilities: bool = False,
) -> Array | tuple[Array, Array]:
    """Turn logits into a label map on the grid of the file they were made from.

    Works on a few slices at a time: beside the logits and the result it takes about
    four float32 pieces of 64 MiB (or of one slice of all outputs, if that is more),
    however large the volume. Voxels outside the crop become background.

    Args:
        logits: Floats (K, D, H, W), before softmax or sigmoid, of any type and device.
        geometry: What `preprocess_image` gave for the image.
        scheme: What the outputs stand for.
        return_probabilities: Give the softmax (classes) or sigmoid (regions) too.

    Returns:
        Integers (I, J, K) as `LabelScheme.decode` gives them; with
        `return_probabilities` also float16 (K, I, J, K), the background's 1
        outside the crop.

    Raises:
        GeometryError: The logits haven't the geometry's shape or the scheme's channels.
    """
    tensor = _as_tensor(logits)
    _check_logits(tensor, geometry, scheme)
    pieces = (
        (part, slice(None), piece)
        for part, piece in resample_slabs(tensor, geometry.cropped_shape)
    )
    label_map, probabilities = restore_pieces(
        pieces, geometry, scheme, return_probabilities=return_probabilities
    )
    return label_map if probabilities is None else (label_map, probabilities)


def restore_pieces(
    pieces: Iterable[tuple[slice, slice, torch.Tensor]],
    geometry: Geometry,
    scheme: LabelScheme,
    *,
    return_probabilities: bool = False,
) -> tuple[Array, Array | None]:
    """Turn logits on the crop's grid into a label map, a piece at a time.

    Args:
        pieces: Ranges along D and H of the crop, and float32 (K, length, rows, W).
        geometry: What `preprocess_image` gave for the image.
        scheme: What the outputs stand for.
        return_probabilities: Give the softmax (classes) or sigmoid (regions) too.

    Returns:
        Integers (I, J, K), and the probabilities as `restore_label_map` gives them,
        or None.

    Raises:
        GeometryError: The logits haven't the scheme's channels.
    """
    dtype = scheme.decode(np.zeros((scheme.num_outputs, 1), np.float32)).dtype
    label_map = np.zeros(geometry.original_shape, dtype)
    target = geometry.orient(label_map)[geometry.crop_slices]
    probabilities = _outside_probabilities(geometry, scheme, return_probabilities)
    for part, rows, piece in pieces:
        _check_outputs(piece, scheme)
        target[part, rows] = _decode(piece, scheme)
        if probabilities is not None:
            inner = geometry.orient(probabilities)[(slice(None), *geometry.crop_slices)]
            share = piece.sigmoid() if scheme.is_region_based else piece.softmax(0)
            inner[:, part, rows] = share.half().cpu().numpy()
    return label_map, probabilities


def normalize_channel(channel: Array, rule: ChannelNormalization) -> Array:
    """Bring one channel's intensities to the scale that the plan names.

    Args:
        channel: Finite numbers (D, H, W).
        rule: The plan's entry for this channel.

    Returns:
        float32 (D, H, W).

    Raises:
        ConfigError: A "ct" rule lacks its bounds, mean or deviation.
    """
    image = np.array(channel, np.float32, order="C")
    if rule.scheme == "none":
        return image
    if rule.scheme == "ct":
        if rule.clip is None or rule.mean is None or rule.std is None:
            raise ConfigError(
                describe(
                    "a ct normalisation is incomplete",
                    expected="clip, mean and std",
                    found=rule,
                )
            )
        np.clip(image, *rule.clip, out=image)
        return _standardize(image, rule.mean, rule.std)
    if rule.scheme == "zscore":
        return _standardize(image, *_moments(image))
    mask = image != 0
    if mask.any():
        image = _standardize(image, *_moments(image[mask]))
        image[~mask] = 0
    return image


def _moments(values: Array) -> tuple[float, float]:
    """Mean and deviation; the shift keeps float32 files of huge values exact."""
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))


def _standardize(image: Array, mean: float, std: float) -> Array:
    image -= np.float32(mean)
    image /= np.float32(max(std, 1e-8))
    return image


def _crop_box(oriented: Array, crop: bool) -> Box:
    if crop:
        return nonzero_box(oriented)
    return cast(Box, tuple((0, int(n)) for n in oriented.shape[1:]))


def _as_tensor(logits: Array | torch.Tensor) -> torch.Tensor:
    if isinstance(logits, np.ndarray):
        return torch.from_numpy(logits if logits.flags.writeable else logits.copy())
    return logits.detach()


def _decode(piece: torch.Tensor, scheme: LabelScheme) -> Array:
    """Decode as the scheme does, where the logits are: labels are less to copy."""
    if scheme.is_region_based:
        labels = torch.zeros(piece.shape[1:], dtype=torch.int16, device=piece.device)
        for channel, value in zip(piece, scheme.regions_order, strict=True):
            labels.masked_fill_(channel > 0, value)
        return labels.cpu().numpy()
    values = torch.tensor(scheme.class_values, dtype=torch.int16, device=piece.device)
    # On CPUs argmax, torch's and numpy's, takes 5 to 10 times as long.
    return values[piece.max(dim=0).indices].cpu().numpy()


def _outside_probabilities(
    geometry: Geometry, scheme: LabelScheme, wanted: bool
) -> Array | None:
    if not wanted:
        return None
    shape = (scheme.num_outputs, *geometry.original_shape)
    probabilities = np.zeros(shape, np.float16)
    if not scheme.is_region_based:
        probabilities[scheme.class_values.index(0)] = 1
    return probabilities


def _check_channels(volume: Volume, plan: Plan) -> None:
    if len(volume.array) != len(plan.normalization):
        raise ConfigError(
            describe(
                "the scan's channels don't fit the plan",
                expected=f"{len(plan.normalization)} channels",
                found=len(volume.array),
                file=volume.path,
            )
        )


def _finite(channel: Array, volume: Volume) -> Array:
    if channel.dtype.kind == "f" and not np.isfinite(channel).all():
        raise FormatError(
            describe(
                "voxels are NaN or infinite",
                expected="finite numbers",
                found=f"{int((~np.isfinite(channel)).sum())} that aren't",
                file=volume.path,
                remedy="Replace them, such as by 0, or leave the case out.",
            )
        )
    return channel


def _check_values(label_map: Array, scheme: LabelScheme, file: Path | None) -> None:
    found = np.unique(label_map)
    unknown = [value.item() for value in found if value not in scheme.known_values]
    if unknown:
        raise FormatError(
            describe(
                "the label map holds unexpected values",
                expected=f"only {list(scheme.known_values)}",
                found=unknown[:10],
                file=file,
            )
        )


def _check_logits(
    logits: torch.Tensor, geometry: Geometry, scheme: LabelScheme
) -> None:
    expected = (scheme.num_outputs, *geometry.shape)
    if tuple(logits.shape) != expected:
        raise GeometryError(
            describe(
                "logits don't fit the scan",
                expected=expected,
                found=tuple(logits.shape),
            )
        )


def _check_outputs(piece: torch.Tensor, scheme: LabelScheme) -> None:
    if len(piece) != scheme.num_outputs:
        raise GeometryError(
            describe(
                "logits don't fit the labels",
                expected=f"{scheme.num_outputs} outputs",
                found=len(piece),
            )
        )
