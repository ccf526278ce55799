"""What is compared with: presets that come from other packages, where installed."""

from __future__ import annotations

from typing import Any

from torch import nn

from segmamba.benchmark.environment import package_version
from segmamba.benchmark.record import Record
from segmamba.errors import BackendUnavailableError
from segmamba.nn import create_network

CHANNELS, OUTPUTS = 4, 4
"""Image channels and classes of every network that is compared."""

PEERS = {
    "resenc": "dynamic-network-architectures",
    "swinunetr": "monai",
    "segresnet": "monai",
}
"""Presets that are compared with, and the package that each needs."""

QUICK_PEERS: dict[str, dict[str, Any]] = {
    "resenc": {"dims": (8, 16), "depths": (1, 1), "strides": (2,)},
    "segresnet": {"base_channels": 8},
}
"""Those of a quick run, and how they are made small."""


def usable_peers(record: Record) -> dict[str, nn.Module]:
    """Note in the record which peers are here, and build those that are.

    Args:
        record: The benchmark's record.

    Returns:
        Networks on the CPU by their preset's name; none if peers are switched off.
    """
    found = {}
    for name, package in PEERS.items() if record.settings.peers else ():
        options = QUICK_PEERS.get(name, {}) if record.settings.quick else {}
        if record.settings.quick and not options:
            record.peer(name, "left out of quick runs")
            continue
        try:
            found[name] = build_peer(name, **options)
        except BackendUnavailableError as error:
            record.peer(name, str(error))
        else:
            record.peer(name, f"{package} {package_version(package)}")
    return found


def build_peer(name: str, **options: Any) -> nn.Module:
    """Build a peer with random weights, without deep supervision.

    Args:
        name: A preset.
        **options: Changes of its configuration.

    Returns:
        The network.

    Raises:
        BackendUnavailableError: Its package is missing.
    """
    plain = {"deep_supervision": False} if name == "resenc" else {}
    return create_network(
        name, in_channels=CHANNELS, out_channels=OUTPUTS, **plain, **options
    )
