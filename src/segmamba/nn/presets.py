"""Networks by name: complete configurations, and how a user's wishes change them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, get_args

from torch import nn

from segmamba.config import (
    AnyNetworkConfig,
    NetworkConfig,
    Orientation,
    PeerConfig,
    from_dict,
)
from segmamba.errors import ConfigError, describe
from segmamba.nn.peers import PEERS, build_peer, peer_config
from segmamba.nn.segmamba import SegMamba
from segmamba.types import Size3

_HEAD = NetworkConfig(
    name="segmamba",
    orientations=("forward", "reverse", "slice"),
    stem="full",
    stem_kernel=7,
    down_norm=True,
    gsc="add",
    gsc_per_layer=False,
    conv_blocks=(0, 0, 0, 0),
    mlp="skip",
    fue=False,
    bottleneck="block",
    skip_block="residual",
    decoder_block="residual",
    final_block=True,
    base_channels=0,
    convolution_init="torch",
    mixer="tom",
)

# Ours, for CPUs: convolutions at the high resolutions, Mamba at the low ones, where
# the sequences are short.
_LIGHT = dataclasses.replace(
    _HEAD,
    name="segmamba-light",
    dims=(32, 64, 128),
    hidden_size=192,
    depths=(0, 1, 2),
    strides=((2, 2, 2), (2, 2, 2), (2, 2, 2)),
    stem="serial",
    gsc="none",
    conv_blocks=(1, 1, 1),
    mlp="none",
    bottleneck="none",
    skip_block="identity",
    decoder_block="conv",
    final_block=False,
    base_channels=16,
    convolution_init="he",
)

PRESETS: dict[str, NetworkConfig] = {
    # The published code at its last version (1039e37, June 2024).
    "segmamba": _HEAD,
    # The published code of the first paper (00eb915, January 2024).
    "segmamba-v1": dataclasses.replace(
        _HEAD,
        name="segmamba-v1",
        orientations=("forward", "reverse"),
        down_norm=False,
        gsc="none",
        mlp="layer",
    ),
    # The text of the MICCAI paper; docs/concepts/network.md has the open choices.
    "segmamba-paper": dataclasses.replace(
        _HEAD,
        name="segmamba-paper",
        stem="depthwise",
        gsc="paper",
        gsc_per_layer=True,
        mlp="layer",
        fue=True,
        bottleneck="down",
    ),
    "segmamba-light": _LIGHT,
    # The same, wider, for small scans on a GPU: what scored best on the hippocampus in
    # equal minutes; docs/reference/results.md has what else was tried.
    "segmamba-small": dataclasses.replace(
        _LIGHT,
        name="segmamba-small",
        dims=(64, 128, 256),
        decoder_block="residual",
        base_channels=32,
    ),
}

_PER_STAGE = ("depths", "strides", "conv_blocks")
_FIELDS = tuple(item.name for item in dataclasses.fields(NetworkConfig))
_PEER_FIELDS = tuple(item.name for item in dataclasses.fields(PeerConfig))
_OF_THE_SCAN = (
    "orientations",
    "num_slices",
    "d_state",
    "d_conv",
    "expand",
    "initialization",
)


def preset_names() -> tuple[str, ...]:
    """Give the names of the presets: SegMamba's, then the other networks'."""
    return (*PRESETS, *PEERS)


def preset_config(name: str = "segmamba", **overrides: Any) -> AnyNetworkConfig:
    """Give a preset's complete configuration, with changes.

    Args:
        name: One of `preset_names()`.
        **overrides: Fields of NetworkConfig, or of PeerConfig for the other networks.
            None keeps the preset's value. A stride may be one number for all three
            axes. If `dims` has another length than the preset's, per-stage settings
            left out are cut, or end in repeats.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: The name or a field is unknown, a field means nothing for this
            network, or a value can't be used.
    """
    preset = PRESETS.get(name)
    if preset is None and name not in PEERS:
        raise ConfigError(_unknown("network", name, preset_names()))
    known = _FIELDS if preset else tuple(dict.fromkeys((*_PEER_FIELDS, *_FIELDS)))
    for key in overrides:
        if key not in known or key == "name":
            raise ConfigError(_unknown("setting of a network", key, known))
    values = {key: value for key, value in overrides.items() if value is not None}
    if "strides" in values:
        values["strides"] = _triples(values["strides"])
    if preset is None:
        return peer_config(name, **values)
    if isinstance(values.get("dims"), Sequence):
        for key in _PER_STAGE:
            values.setdefault(key, _fit(getattr(preset, key), len(values["dims"])))
    merged = {**dataclasses.asdict(preset), **values, "name": name}
    config = from_dict(NetworkConfig, merged, source=f"network '{name}'")
    check_network_config(config)
    return config


def complete_config(config: AnyNetworkConfig) -> AnyNetworkConfig:
    """Fill what a configuration leaves to its preset.

    Args:
        config: A configuration in which None means "as the preset".

    Returns:
        The complete configuration, checked.

    Raises:
        ConfigError: A value can't be used.
    """
    fields = dataclasses.asdict(config)
    return preset_config(fields.pop("name"), **fields)


def build_network(config: AnyNetworkConfig) -> nn.Module:
    """Build the network that a configuration describes, with random weights.

    Args:
        config: A configuration; None in a field takes the preset's value.

    Returns:
        A module whose `config` is the complete configuration.

    Raises:
        ConfigError: A value can't be used.
        BackendUnavailableError: The package that has the network isn't installed.
    """
    complete = complete_config(config)
    if isinstance(complete, PeerConfig):
        return build_peer(complete)
    return SegMamba(complete)


def create_network(
    name: str = "segmamba",
    *,
    in_channels: int,
    out_channels: int,
    dims: Sequence[int] | None = None,
    hidden_size: int | None = None,
    depths: Sequence[int] | None = None,
    strides: Sequence[int | Size3] | None = None,
    num_slices: Sequence[int] | None = None,
    orientations: Sequence[Orientation] | None = None,
    d_state: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network by name; what is None is the preset's.

    Args:
        name: One of `preset_names()`.
        in_channels: Image channels.
        out_channels: Channels of the logits.
        dims: Channels of each of the 2 to 6 encoder stages.
        hidden_size: Channels of the deepest block.
        depths: Mamba layers of each stage, 0 allowed.
        strides: Down-sampling in front of each stage, along (D, H, W) or one number.
        num_slices: Slices of each stage for the inter-slice scan, as the published
            constants (64, 32, 16, 8); None reads them off the feature map.
        orientations: Scan orders.
        d_state: States of each channel in the scan.
        **options: Any other field of NetworkConfig (or PeerConfig), such as
            `deep_supervision`.

    Returns:
        A module from (B, in_channels, D, H, W) to logits (B, out_channels, D, H, W).

    Raises:
        ConfigError: A name or value can't be used.
        BackendUnavailableError: The package that has the network isn't installed.
    """
    config = preset_config(
        name,
        in_channels=in_channels,
        out_channels=out_channels,
        dims=dims,
        hidden_size=hidden_size,
        depths=depths,
        strides=strides,
        num_slices=num_slices,
        orientations=orientations,
        d_state=d_state,
        **options,
    )
    return build_network(config)


def count_parameters(network: nn.Module) -> int:
    """Count the trainable numbers of a network."""
    return sum(item.numel() for item in network.parameters() if item.requires_grad)


def check_network_config(config: NetworkConfig) -> None:
    """Check that a complete configuration describes a network.

    Args:
        config: A complete configuration.

    Raises:
        ConfigError: A number is out of range, or tuples differ in length.
    """
    stages = len(config.dims)
    if not 2 <= stages <= 6:
        raise _bad("dims", "2 to 6 stages", config.dims)
    for key in ("depths", "strides", "num_slices", "conv_blocks"):
        value = getattr(config, key)
        if value is not None and len(value) != stages:
            raise _bad(key, f"{stages} entries, one a stage", value)
    for key, least in _LEAST.items():
        value = getattr(config, key)
        if value is not None and min(_flat(value)) < least:
            raise _bad(key, f"no number below {least}", value)
    if not (config.stem_kernel or 7) % 2:
        raise _bad("stem_kernel", "an odd number", config.stem_kernel)
    orders = config.orientations or ()
    if not orders or len(set(orders)) < len(orders):
        known = ", ".join(get_args(Orientation))
        raise _bad("orientations", f"one or more of {known}, none twice", orders)
    if config.mixer != "tom":
        _check_mixer(config)


def _check_mixer(config: NetworkConfig) -> None:
    """Refuse settings of a scan that isn't there."""
    preset = PRESETS[config.name]
    for key in _OF_THE_SCAN:
        if getattr(config, key) != getattr(preset, key):
            expected = f"none beside mixer {config.mixer}, which has no scan"
            raise _bad(key, expected, getattr(config, key))


_LEAST = {
    "in_channels": 1,
    "out_channels": 1,
    "dims": 1,
    "hidden_size": 1,
    "depths": 0,
    "strides": 1,
    "num_slices": 1,
    "d_state": 1,
    "d_conv": 1,
    "expand": 1,
    "stem_kernel": 1,
    "conv_blocks": 0,
    "base_channels": 0,
}


def _flat(value: Any) -> list[int]:
    if not isinstance(value, tuple):
        return [value]
    return [number for item in value for number in _flat(item)]


def _triples(strides: Any) -> Any:
    if not isinstance(strides, Sequence) or isinstance(strides, str):
        return strides
    return tuple(
        (item,) * 3 if isinstance(item, int) else tuple(item) for item in strides
    )


def _fit(values: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    return (values + values[-1:] * length)[:length]


def _bad(key: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        describe(f"bad {key} of a network", expected=expected, found=found)
    )


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return describe(
        f"unknown {kind} '{name}'",
        expected="one of " + ", ".join(known),
        remedy=f"Did you mean '{close[0]}'?" if close else None,
    )
