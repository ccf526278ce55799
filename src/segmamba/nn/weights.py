"""Weights under the published code's names, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segmamba.config import NetworkConfig
from segmamba.errors import CheckpointError, describe
from segmamba.nn.segmamba import SegMamba

_SUFFIX = {"forward": "", "reverse": "_b", "slice": "_s"}
_WRAPPERS = ("module", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 5


def load_published_weights(
    network: nn.Module, state_dict: Mapping[str, Any]
) -> nn.Module:
    """Fill a network with weights that carry the published code's names.

    Args:
        network: Of the preset segmamba or segmamba-v1, of any size.
        state_dict: Tensors by name: bare, with "module." before each name, or nested
            under "module", "state_dict" or "model".

    Returns:
        The same network.

    Raises:
        CheckpointError: Names are missing or unexpected, shapes differ, or the network
            has no published counterpart. Nothing is changed then.
    """
    names = published_names(network)
    found = _bare(state_dict)
    own = dict(network.named_parameters())
    wanted = {public: own[name] for name, public in names.items()}
    _compare(wanted, found)
    with torch.no_grad():
        for public, parameter in wanted.items():
            parameter.copy_(torch.as_tensor(found[public]))
    return network


def published_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Give a network's weights under the published code's names.

    Heads of deep supervision have no counterpart and are left out.

    Args:
        network: Of the preset segmamba or segmamba-v1, of any size.

    Returns:
        Detached tensors by name, sharing memory with the network.

    Raises:
        CheckpointError: The network has no published counterpart.
    """
    own = dict(network.named_parameters())
    names = published_names(network)
    return {public: own[name].detach() for name, public in names.items()}


def published_names(network: nn.Module) -> dict[str, str]:
    """Map the names of a network's parameters to the published ones.

    Args:
        network: Of the preset segmamba or segmamba-v1, of any size.

    Returns:
        The published name of each parameter that has one.

    Raises:
        CheckpointError: The network has no published counterpart.
    """
    if not isinstance(network, SegMamba) or not _is_published(network.config):
        raise CheckpointError(
            describe(
                "this network has no published counterpart",
                expected="the structure of the preset segmamba or segmamba-v1",
                found=getattr(getattr(network, "config", None), "name", network),
            )
        )
    return {
        name: _published_name(name, network.config)
        for name, _ in network.named_parameters()
        if not name.startswith("lower_heads.")
    }


def _is_published(config: NetworkConfig) -> bool:
    common = (
        config.stem == "full"
        and config.bottleneck == "block"
        and config.skip_block == config.decoder_block == "residual"
        and bool(config.final_block)
        and not any(config.conv_blocks or ())
        and not config.gsc_per_layer
        and not config.base_channels
        and not config.fue
        and set(config.orientations or ()) <= set(_SUFFIX)
    )
    head = (config.gsc in ("add", "mul"), config.mlp, config.down_norm)
    return common and head in ((True, "skip", True), (False, "layer", False))


def _published_name(name: str, config: NetworkConfig) -> str:
    room, _, rest = name.partition(".")
    stages = len(config.dims)
    if room == "stages":
        return "vit." + _stage_name(rest, config)
    if room == "first_block":
        return f"encoder1.layer.{_convolution(rest)}"
    if room == "skips":
        index, _, rest = rest.partition(".")
        return f"encoder{int(index) + 2}.layer.{_convolution(rest)}"
    if room == "bottom":
        return f"encoder{stages + 1}.layer.{_convolution(rest)}"
    if room == "decoder":
        index, part, rest = rest.split(".", 2)
        part = "transp_conv.conv." if part == "up" else "conv_block."
        rest = rest if part.startswith("transp") else _convolution(rest)
        return f"decoder{int(index) + 2}.{part}{rest}"
    if room == "final_block":
        return f"decoder1.layer.{_convolution(rest)}"
    return f"out.conv.conv.{rest}"


def _convolution(rest: str) -> str:
    """Turn "conv1.weight" into MONAI's "conv1.conv.weight"."""
    return rest.replace(".", ".conv.", 1)


_GSC = {"spatial1": "proj", "spatial2": "proj2", "gate": "proj3", "fuse": "proj4"}


def _stage_name(rest: str, config: NetworkConfig) -> str:
    index, part, rest = rest.split(".", 2)
    if part == "down":
        slot = "1" if config.down_norm and index != "0" else "0"
        return f"downsample_layers.{index}.{slot}.{rest.removeprefix('conv.')}"
    if part == "gsc":
        convolution, _, rest = rest.partition(".")
        return f"gscs.{index}.{_GSC[convolution]}.{rest}"
    if part == "skip_mlp":
        return f"mlps.{index}.{rest}"
    layer, part, rest = rest.split(".", 2)
    with_mlp = config.mlp == "layer"
    if part == "mixer":
        part, rest = "mamba", mixer_name(rest, config.orientations or ())
    elif part == "norm" and with_mlp:
        part = "norm1"
    elif part == "mlp_norm":
        part = "norm2"
    return f"stages.{index}.{layer}.{part}.{rest}"


def mixer_name(name: str, orientations: tuple[str, ...]) -> str:
    """Give the published name of a parameter of the tri-orientated Mamba.

    Args:
        name: Such as "in_proj.weight" or "directions.1.A_log".
        orientations: The scan orders of the mixer.

    Returns:
        Such as "in_proj.weight" or "A_b_log".
    """
    if not name.startswith("directions."):
        return name
    _, index, parameter = name.split(".")
    suffix = _SUFFIX[orientations[int(index)]]
    if parameter == "A_log":
        return f"A{suffix}_log"
    if parameter == "D":
        return f"D{suffix}"
    if parameter.startswith("conv_"):
        return f"conv1d{suffix}.{parameter.removeprefix('conv_')}"
    part, _, kind = parameter.rpartition("_")
    return f"{part}{suffix}.{kind}"


def _bare(state_dict: Any) -> dict[str, Any]:
    """Take the wrappers off a state dict."""
    found = state_dict
    for _ in range(4):
        nested = [
            found[key]
            for key in _WRAPPERS
            if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)
        ]
        if not nested:
            break
        found = nested[0]
    if not isinstance(found, Mapping) or not all(isinstance(k, str) for k in found):
        raise CheckpointError(
            describe(
                "these are no weights",
                expected="a mapping of names to tensors",
                found=type(found).__name__,
            )
        )
    names = dict(found)
    while names and any(all(n.startswith(p) for n in names) for p in _PREFIXES):
        names = {name.partition(".")[2]: value for name, value in names.items()}
    return names


def _compare(wanted: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    mismatched = [
        f"{name} {_shape(found[name])} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and _shape(found[name]) != tuple(wanted[name].shape)
    ]
    problems = [
        f"{title} ({len(items)}): {_shorten(items)}"
        for title, items in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("shapes differ", mismatched),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            describe(
                "these weights do not fit the network",
                expected=f"{len(wanted)} tensors with the published names",
                found="; ".join(problems),
                remedy="Build the network with the preset (segmamba or segmamba-v1), "
                "channels and sizes that the weights were trained with.",
            )
        )


def _shape(value: Any) -> tuple[int, ...] | str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else tuple(shape)


def _shorten(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return f"{shown}, ..." if len(items) > _SHOWN else shown
