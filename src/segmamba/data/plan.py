"""The plan: every decision between a scan and the network, in one readable file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from segmamba.atomic import MADE_ANEW, read_json, write_json
from segmamba.config import AnyNetworkConfig, from_dict, network_from_dict, to_dict
from segmamba.data.dataset import Dataset
from segmamba.data.fingerprint import ChannelFingerprint, Fingerprint
from segmamba.data.geometry import world_axes
from segmamba.data.memory import (
    USABLE_SHARE,
    device_memory_mib,
    prediction_memory_mib,
    training_memory_mib,
)
from segmamba.data.networks import (
    Problem,
    check_network,
    fit_network,
    network_strides,
    patch_problems,
)
from segmamba.data.planning import (
    MAX_VOXELS,
    choose_batch,
    choose_orientation,
    choose_patch,
    choose_spacing,
    median_shape,
    to_tensor_axes,
)
from segmamba.errors import ConfigError, describe
from segmamba.types import Size3, Spacing3

ZERO_BACKGROUND_SHARE = 0.25
"""Share of voxels that are exactly 0 from which an image counts as masked."""

_OVERRIDES = "the plan with its overrides"
_PREPROCESSING = (
    "orientation",
    "spacing_mm",
    "normalization",
    "resampling",
    "crop_to_nonzero",
)


@dataclass(frozen=True)
class ChannelNormalization:
    """How one channel's intensities are brought to a common scale."""

    scheme: Literal["ct", "zscore", "zscore-nonzero", "none"]
    """ct: clip to the foreground's percentiles of the training set, then its mean and
    deviation; zscore: over the image; zscore-nonzero: over its non-zero voxels, the
    others become 0."""
    clip: tuple[float, float] | None = None
    """Lower and upper bound (ct)."""
    mean: float | None = None
    """Mean to subtract (ct)."""
    std: float | None = None
    """Standard deviation to divide by (ct)."""


@dataclass(frozen=True)
class Plan:
    """Every decision between a scan and the network. Axes are (D, H, W)."""

    orientation: str
    """Three axis codes such as "SPL": where each of D, H, W points to."""
    spacing_mm: Spacing3
    """Voxel distance of the network's input along (D, H, W)."""
    patch_size: Size3
    """Voxels of a training patch and of a prediction window along (D, H, W)."""
    batch_size: int
    """Patches in a training batch."""
    normalization: tuple[ChannelNormalization, ...]
    """One for each channel."""
    network: AnyNetworkConfig
    """What to build."""
    resampling: Literal["linear", "cubic"] = "linear"
    """Interpolation of images; labels and logits are always linear."""
    crop_to_nonzero: bool = True
    """Crop to the bounding box of the voxels that aren't zero in every channel."""
    memory_training_mib: float | None = None
    """Estimated peak memory of a training step."""
    memory_prediction_mib: float | None = None
    """Estimated peak memory of a window's forward pass."""


def make_plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    network: AnyNetworkConfig,
    device: str = "cpu",
    memory_mib: float | None = None,
    overrides: dict[str, Any] | None = None,
) -> Plan:
    """Decide everything between a scan and the network.

    Args:
        fingerprint: What the data set looks like.
        dataset: Its channels and labels.
        network: A preset's configuration; channels, strides and the number of stages
            are fitted to the data.
        device: "cpu" (patches up to 64^3 voxels, batches of two) or "cuda" (patches
            up to 128^3, batches that fill the memory).
        memory_mib: The device's memory; a training step may fill nine tenths of it.
            None takes the GPU's, or 8 GiB.
        overrides: Fields of `Plan` that are decided already, such as
            {"patch_size": [64, 64, 64], "network": {"d_state": 8}}. What depends on
            them follows.

    Returns:
        The plan, checked.

    Raises:
        ConfigError: An override is unknown (the nearest key is named) or unusable, or
            fingerprint and data set differ in their channels.
    """
    overrides = overrides or {}
    _check_channels(fingerprint, dataset)
    wanted = {**to_dict(network), **_network_overrides(overrides)}
    network = network_from_dict(wanted, source=_OVERRIDES)
    memory = USABLE_SHARE * (memory_mib or device_memory_mib(device))
    draft = _draft(fingerprint, dataset, network, device, memory, {})
    chosen = _override(draft, overrides)  # also checks keys and types
    _check_grid(chosen, _OVERRIDES)
    given = {key: getattr(chosen, key) for key in overrides if key != "network"}
    if "strides" in _network_overrides(overrides):
        given["strides"] = network.strides
    plan = _draft(fingerprint, dataset, network, device, memory, given)
    plan = _estimate(_override(plan, overrides), device)
    validate_plan(plan, source=_OVERRIDES)
    return plan


def save_plan(path: Path | str, plan: Plan) -> None:
    """Write a plan atomically as JSON that people can read and edit."""
    write_json(path, to_dict(plan))


def load_plan(path: Path | str) -> Plan:
    """Read a plan, perhaps edited by hand.

    Raises:
        FormatError: The file is missing or not JSON.
        ConfigError: A key is unknown or missing, or a value can't be used; the text
            says which and what would do.
    """
    plan = from_dict(Plan, read_json(path, MADE_ANEW), source=str(path))
    validate_plan(plan, source=path)
    return plan


def plan_hash(plan: Plan) -> str:
    """Sum up what changes preprocessed cases.

    That is orientation, spacing, normalisation, resampling and crop.

    Args:
        plan: The plan.

    Returns:
        16 hexadecimal digits.
    """
    values = to_dict(plan)
    kept = {key: values[key] for key in _PREPROCESSING}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def validate_plan(plan: Plan, *, source: Path | str = "the plan") -> None:
    """Check what the types of the fields don't.

    Args:
        plan: The plan.
        source: What the error names, such as a file.

    Raises:
        ConfigError: A value can't be used.
    """
    _check_grid(plan, source)
    _raise_first(_network_problems(plan, source), source)
    _raise_first(_normalization_problems(plan.normalization), source)


def _check_grid(plan: Plan, source: Path | str) -> None:
    try:
        world_axes(plan.orientation)
    except ConfigError as error:
        raise ConfigError(f"{error} In {source}.") from error
    _raise_first(_grid_problems(plan), source)


def _raise_first(problems: Iterator[Problem], source: Path | str) -> None:
    for problem, expected, found in problems:
        raise ConfigError(
            describe(problem, expected=expected, found=found, file=source)
        )


def _grid_problems(plan: Plan) -> Iterator[Problem]:
    if min(plan.spacing_mm) <= 0 or not all(map(math.isfinite, plan.spacing_mm)):
        yield "bad spacing_mm", "three numbers of mm above 0", plan.spacing_mm
    if min(plan.patch_size) < 1:
        yield "bad patch_size", "three numbers of 1 or more", plan.patch_size
    if plan.batch_size < 1:
        yield "bad batch_size", "1 or more", plan.batch_size


def _network_problems(plan: Plan, source: Path | str) -> Iterator[Problem]:
    network = plan.network
    if len(plan.normalization) != network.in_channels:
        yield (
            "wrong number of normalizations",
            f"{network.in_channels}, one for each channel (network.in_channels)",
            len(plan.normalization),
        )
    strides, problems = check_network(network, source)
    yield from problems
    yield from patch_problems(network, strides, plan.patch_size)


def _normalization_problems(
    rules: Sequence[ChannelNormalization],
) -> Iterator[Problem]:
    for index, rule in enumerate(rules):
        name = f"bad normalization of channel {index}"
        if rule.scheme != "ct":
            continue
        if rule.clip is None or rule.mean is None or rule.std is None:
            yield name, "clip, mean and std beside scheme ct", rule
        elif rule.clip[0] >= rule.clip[1]:
            yield name, "clip with its lower bound first", rule.clip
        elif rule.std <= 0:
            yield name, "std above 0", rule.std


def _draft(
    fingerprint: Fingerprint,
    dataset: Dataset,
    network: AnyNetworkConfig,
    device: str,
    memory_mib: float,
    given: dict[str, Any],
) -> Plan:
    """Decide all that `given` doesn't."""
    cases = fingerprint.cases
    spacing = choose_spacing(cases)
    orientation = given.get("orientation") or choose_orientation(spacing)
    spacing = given.get("spacing_mm") or to_tensor_axes(spacing, orientation)
    median = median_shape(cases, orientation, spacing)
    channels, outputs = len(dataset.channels), dataset.labels.num_outputs

    def strides_for(size: Sequence[float]) -> tuple[Size3, ...]:
        return given.get("strides") or network_strides(network, size, spacing)

    def memory_for(patch: Size3, strides: tuple[Size3, ...], batch: int) -> float:
        fitted = fit_network(network, strides, patch, channels, outputs)
        return training_memory_mib(fitted, patch, batch, device)

    def fits(patch: Size3, strides: tuple[Size3, ...]) -> bool:
        if math.prod(patch) > MAX_VOXELS[_kind(device)]:
            return False
        return memory_for(patch, strides, 2) <= memory_mib

    if "patch_size" in given:
        patch = given["patch_size"]
        strides = strides_for(patch)
    else:
        patch, strides = choose_patch(median, spacing, strides_for, fits)
    voxels = float(math.prod(median)) * len(cases)
    batch = 2
    if _kind(device) == "cuda":
        batch = choose_batch(
            patch, voxels, partial(memory_for, patch, strides), memory_mib
        )
    return Plan(
        orientation=orientation,
        spacing_mm=spacing,
        patch_size=patch,
        batch_size=batch,
        normalization=tuple(map(choose_normalization, fingerprint.channels)),
        network=fit_network(network, strides, patch, channels, outputs),
    )


def choose_normalization(channel: ChannelFingerprint) -> ChannelNormalization:
    """Choose how a channel is brought to a common scale.

    Args:
        channel: The channel's intensities.

    Returns:
        ct for CT; zscore-nonzero where a quarter or more of the median image is
        exactly 0 (skull-stripped MR); none where the channel's name asks for it;
        zscore otherwise.
    """
    if channel.modality == "none":
        return ChannelNormalization("none")
    if channel.modality == "ct":
        low, high = channel.percentile_00_5, channel.percentile_99_5
        return ChannelNormalization(
            "ct", (low, max(high, low + 1)), channel.mean, max(channel.std, 1e-3)
        )
    masked = channel.zero_share >= ZERO_BACKGROUND_SHARE
    return ChannelNormalization("zscore-nonzero" if masked else "zscore")


def _override(plan: Plan, overrides: dict[str, Any]) -> Plan:
    merged = {**to_dict(plan), **overrides}
    merged["network"] = {**to_dict(plan.network), **_network_overrides(overrides)}
    return from_dict(Plan, merged, source=_OVERRIDES)


def _network_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    network = overrides.get("network", {})
    return network if isinstance(network, dict) else to_dict(network)


def _estimate(plan: Plan, device: str) -> Plan:
    return dataclasses.replace(
        plan,
        memory_training_mib=round(
            training_memory_mib(plan.network, plan.patch_size, plan.batch_size, device)
        ),
        memory_prediction_mib=round(
            prediction_memory_mib(plan.network, plan.patch_size, device)
        ),
    )


def _check_channels(fingerprint: Fingerprint, dataset: Dataset) -> None:
    names = tuple(channel.name for channel in fingerprint.channels)
    if names != dataset.channels:
        raise ConfigError(
            describe(
                "fingerprint and data set differ in their channels",
                expected=dataset.channels,
                found=names,
                remedy="Make the fingerprint again.",
            )
        )


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"
