"""How a plan fits a network to the data: SegMamba, or a network of another paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from segmamba.config import AnyNetworkConfig, NetworkConfig, PeerConfig
from segmamba.data.planning import adapt_network, choose_strides, total_strides
from segmamba.errors import ConfigError
from segmamba.nn.peers import check_peer_config
from segmamba.types import Size3, Spacing3

Problem = tuple[str, str, object]
"""What is wrong, what was expected, what was found."""


def network_strides(
    network: AnyNetworkConfig, size: Sequence[float], spacing_mm: Spacing3
) -> tuple[Size3, ...]:
    """Choose a network's down-sampling for a patch.

    Args:
        network: A preset's configuration, with all of its stages.
        size: Voxels of the patch along (D, H, W); fractions are fine.
        spacing_mm: Along (D, H, W).

    Returns:
        One stride for each down-sampling; a network's own where they are fixed.
    """
    if network.dims is None:
        return network.strides or ()
    return choose_strides(size, spacing_mm, len(network.strides or ()))


def fit_network(
    network: AnyNetworkConfig,
    strides: tuple[Size3, ...],
    patch_size: Size3,
    in_channels: int,
    out_channels: int,
) -> AnyNetworkConfig:
    """Fit a preset to a data set.

    Args:
        network: The preset's configuration.
        strides: What `network_strides` chose; the deepest stages fall away.
        patch_size: Voxels of a patch along (D, H, W).
        in_channels: Image channels.
        out_channels: Channels of the logits.

    Returns:
        The configuration. A network that is built for one size gets the patch's,
        rounded up to what its strides divide.
    """
    if isinstance(network, NetworkConfig):
        return adapt_network(network, strides, in_channels, out_channels)
    fitted = dataclasses.replace(
        network, in_channels=in_channels, out_channels=out_channels
    )
    if network.patch_size is not None:
        size = _round_up(patch_size, total_strides(strides))
        return dataclasses.replace(fitted, patch_size=size)
    if network.dims is None:
        return fitted
    stages = len(network.dims) - len(network.strides or ()) + len(strides)
    hidden = network.hidden_size
    if hidden is not None:  # keeps its width relative to the last stage
        hidden = round(hidden / network.dims[-1] * network.dims[stages - 1])
    return dataclasses.replace(
        fitted,
        strides=strides,
        dims=network.dims[:stages],
        depths=network.depths and network.depths[:stages],
        hidden_size=hidden,
    )


def check_network(
    network: AnyNetworkConfig, source: Path | str
) -> tuple[tuple[Size3, ...], Iterator[Problem]]:
    """Check a plan's network by itself.

    Args:
        network: The plan's.
        source: What the error names, such as a file.

    Returns:
        Its strides, and what is wrong with it.

    Raises:
        ConfigError: It is another paper's and can't be built.
    """
    if isinstance(network, NetworkConfig):
        return network.strides, _stage_problems(network)
    try:
        check_peer_config(network)
    except ConfigError as error:
        raise ConfigError(f"{error} In {source}.") from error
    return network.strides or (), iter(())


def patch_problems(
    network: AnyNetworkConfig, strides: tuple[Size3, ...], patch_size: Size3
) -> Iterator[Problem]:
    """Say what is wrong with a patch for a network.

    Args:
        network: The plan's.
        strides: Its strides.
        patch_size: Voxels along (D, H, W).

    Yields:
        Problems.
    """
    totals = total_strides(strides)
    limit = network.patch_size if isinstance(network, PeerConfig) else None
    if limit and any(n > most for n, most in zip(patch_size, limit, strict=True)):
        yield (
            "patch_size is too large",
            f"at most network.patch_size, {limit}",
            patch_size,
        )
    if any(n < total for n, total in zip(patch_size, totals, strict=True)):
        yield (
            "patch_size is too small",
            f"at least {totals}, which the strides of the network divide",
            patch_size,
        )
    elif math.prod(patch_size) <= math.prod(totals):
        yield (
            "patch_size is too small",
            f"more than {totals}, of which the network would leave one voxel",
            patch_size,
        )


def _stage_problems(network: NetworkConfig) -> Iterator[Problem]:
    stages = len(network.dims)
    for name in ("depths", "strides"):
        if len(getattr(network, name)) != stages:
            yield (
                f"bad network.{name}",
                f"{stages} entries, one for each of network.dims",
                getattr(network, name),
            )
    if any(step < 1 for stride in network.strides for step in stride):
        yield "bad network.strides", "1 or more", network.strides


def _round_up(size: Size3, steps: Size3) -> Size3:
    sides = [-(-n // step) * step for n, step in zip(size, steps, strict=True)]
    return (sides[0], sides[1], sides[2])
