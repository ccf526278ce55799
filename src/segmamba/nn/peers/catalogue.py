"""The peers by name: sizes as in their papers, and what of them can be changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from segmamba.config import PeerConfig, from_dict
from segmamba.errors import ConfigError, describe
from segmamba.nn.peers.from_monai import build_from_monai
from segmamba.nn.peers.from_nnunet import build_from_nnunet
from segmamba.nn.peers.network import PeerNetwork
from segmamba.nn.peers.uxnet import UXNet

_HALVE = (2, 2, 2)
_PLANNED = {"unet": 1, "resenc": 1, "uxnet": 0}
"""Peers whose strides follow the data, and the stages that have none in front."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network of another paper."""

    config: PeerConfig
    """Its sizes there."""
    build: Callable[[PeerConfig], nn.Module]
    """Makes it out of a complete configuration."""
    deep_supervision: bool = False
    """Whether it can give logits at lower resolutions."""
    checkpointing: bool = False
    """Whether it can recompute activations."""


_SWIN = PeerConfig(
    name="swinunetr", base_channels=48, depths=(2, 2, 2, 2), strides=(_HALVE,) * 5
)

PEERS: dict[str, Peer] = {
    # nnU-Net's planner for BraTS at 128^3; the residual one with its preset L.
    "unet": Peer(
        PeerConfig(
            name="unet",
            dims=(32, 64, 128, 256, 320, 320),
            depths=(2,) * 6,
            strides=(_HALVE,) * 5,
            deep_supervision=True,
        ),
        build_from_nnunet,
        deep_supervision=True,
    ),
    "resenc": Peer(
        PeerConfig(
            name="resenc",
            dims=(32, 64, 128, 256, 320, 320),
            depths=(1, 3, 4, 6, 6, 6),
            strides=(_HALVE,) * 5,
            deep_supervision=True,
        ),
        build_from_nnunet,
        deep_supervision=True,
    ),
    # arXiv 2209.15076
    "uxnet": Peer(
        PeerConfig(
            name="uxnet",
            dims=(48, 96, 192, 384),
            depths=(2, 2, 2, 2),
            strides=(_HALVE,) * 4,
            hidden_size=768,
        ),
        UXNet,
    ),
    # arXiv 1810.11654, without its dropout and its autoencoder
    "segresnet": Peer(
        PeerConfig(
            name="segresnet",
            base_channels=32,
            depths=(1, 2, 2, 4),
            strides=(_HALVE,) * 3,
        ),
        build_from_monai,
    ),
    # arXiv 2103.10504
    "unetr": Peer(
        PeerConfig(
            name="unetr",
            base_channels=16,
            hidden_size=768,
            patch_size=(128, 128, 128),
            strides=(_HALVE,) * 4,
        ),
        build_from_monai,
    ),
    # arXiv 2201.01266
    "swinunetr": Peer(_SWIN, build_from_monai, checkpointing=True),
    # Its second version: a residual convolution in front of each stage
    "swinunetr-v2": Peer(
        dataclasses.replace(_SWIN, name="swinunetr-v2"),
        build_from_monai,
        checkpointing=True,
    ),
    # arXiv 2303.09975: size B, kernel 3
    "mednext": Peer(
        PeerConfig(
            name="mednext",
            base_channels=32,
            depths=(2,) * 5,
            strides=(_HALVE,) * 4,
            deep_supervision=True,
        ),
        build_from_monai,
        deep_supervision=True,
    ),
}

_MULTIPLES = {
    "segresnet": (8, "its group norm has 8 groups"),
    "swinunetr": (12, "its attention has 3 heads at first, its windows halves"),
    "swinunetr-v2": (12, "its attention has 3 heads at first, its windows halves"),
}


def peer_config(name: str, **overrides: Any) -> PeerConfig:
    """Give a peer's complete configuration, with changes.

    Args:
        name: One of PEERS.
        **overrides: Fields of PeerConfig. None keeps the peer's value. With `dims` of
            another length, per-stage settings left out are cut, or end in repeats.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: A field means nothing for this network, or a value can't be used.
    """
    preset = PEERS[name].config
    values = {key: value for key, value in overrides.items() if value is not None}
    usable = settings_of(name)
    for key in values:
        if key not in usable and values[key] != getattr(preset, key, _MISSING):
            raise ConfigError(
                describe(
                    f"{name} has no setting '{key}'",
                    expected="one of " + ", ".join(usable),
                    found=repr(values[key])[:60],
                )
            )
    values = {key: value for key, value in values.items() if key in usable}
    if "dims" in values and isinstance(values["dims"], (list, tuple)):
        _fit_stages(values, preset, len(values["dims"]))
    merged = {**dataclasses.asdict(preset), **values}
    config = from_dict(PeerConfig, merged, source=f"network '{name}'")
    check_peer_config(config)
    return config


_MISSING = object()


def settings_of(name: str) -> tuple[str, ...]:
    """Name the fields of PeerConfig that can be changed for a network.

    Args:
        name: One of PEERS.

    Returns:
        The names.
    """
    peer = PEERS[name]
    switches = ("deep_supervision", "checkpointing")
    fixed = {"name", *(key for key in switches if not getattr(peer, key))}
    if name not in _PLANNED:
        fixed.add("strides")
    return tuple(
        item.name
        for item in dataclasses.fields(PeerConfig)
        if item.name not in fixed and getattr(peer.config, item.name) is not None
    )


def build_peer(config: PeerConfig) -> PeerNetwork:
    """Build a peer with random weights.

    Args:
        config: A complete configuration.

    Returns:
        A module from (B, in_channels, D, H, W) to logits (B, out_channels, D, H, W).

    Raises:
        BackendUnavailableError: The package that has it isn't installed; the text
            names the extra.
    """
    return PeerNetwork(config, PEERS[config.name].build(config))


def check_peer_config(config: PeerConfig) -> None:
    """Check that a complete configuration describes a network.

    Args:
        config: A complete configuration.

    Raises:
        ConfigError: A number is out of range, or tuples differ in length.
    """
    for key in ("in_channels", "out_channels", "base_channels", "hidden_size"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise _bad(config, key, "1 or more", value)
    for key in ("dims", "depths", "patch_size"):
        value = getattr(config, key)
        if value is not None and min(value, default=0) < 1:
            raise _bad(config, key, "numbers of 1 or more", value)
    _check_fixed(config)
    _check_stages(config)
    multiple, because = _MULTIPLES.get(config.name, (1, ""))
    if (config.base_channels or 0) % multiple:
        expected = f"a multiple of {multiple}, for {because}"
        raise _bad(config, "base_channels", expected, config.base_channels)
    if config.name == "unetr":
        _check_unetr(config)


def _check_fixed(config: PeerConfig) -> None:
    """Refuse what a network doesn't have, or can't change."""
    usable, preset = settings_of(config.name), PEERS[config.name].config
    for item in dataclasses.fields(PeerConfig):
        value, own = getattr(config, item.name), getattr(preset, item.name)
        if item.name not in usable and value != own:
            raise _bad(config, item.name, f"{own}, which is fixed", value)
        if value is None and own is not None:
            raise _bad(config, item.name, f"such as {own}", value)


def _check_stages(config: PeerConfig) -> None:
    strides = config.strides or ()
    if any(step < 1 for stride in strides for step in stride):
        raise _bad(config, "strides", "numbers of 1 or more", strides)
    if config.dims is None:
        wanted = len(PEERS[config.name].config.depths or ())
        if len(config.depths or ()) != wanted:
            raise _bad(config, "depths", f"{wanted} entries", config.depths)
        return
    stages = len(config.dims)
    if not 2 <= stages <= 8:
        raise _bad(config, "dims", "2 to 8 stages", config.dims)
    if len(config.depths or ()) != stages:
        raise _bad(config, "depths", f"{stages} entries, one a stage", config.depths)
    wanted = stages - _PLANNED[config.name]
    if len(strides) != wanted:
        raise _bad(config, "strides", f"{wanted} entries", strides)


def _check_unetr(config: PeerConfig) -> None:
    if any(side % 16 for side in config.patch_size or ()):
        raise _bad(config, "patch_size", "multiples of 16", config.patch_size)
    if (config.hidden_size or 0) % 12:
        expected = "a multiple of 12, for it has 12 heads"
        raise _bad(config, "hidden_size", expected, config.hidden_size)


def _fit_stages(values: dict[str, Any], preset: PeerConfig, stages: int) -> None:
    """Cut or repeat what `values` leaves out of the settings of each stage."""
    for key, length in (
        ("depths", stages),
        ("strides", stages - _PLANNED[preset.name]),
    ):
        kept = getattr(preset, key)
        values.setdefault(key, (kept + kept[-1:] * length)[:length])


def _bad(config: PeerConfig, key: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        describe(f"bad {key} of {config.name}", expected=expected, found=found)
    )
