"""What is compared with: built as its authors configure it, where it is installed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from segmamba.benchmark.environment import package_version, why_not_importable
from segmamba.benchmark.record import Record

CHANNELS, OUTPUTS = 4, 4
"""Image channels and classes of every network that is compared."""


@dataclass(frozen=True)
class Peer:
    """A network of another package."""

    package: str
    """Name on the package index."""
    module: str
    """What is imported."""
    build: Callable[[int], nn.Module]
    """From the side of the volume to the network with random weights."""
    least_side: int
    """Smallest side that it can train on."""


def _resenc(side: int) -> nn.Module:
    """nnU-Net's ResEnc-L as it plans it for 128^3 patches, without deep supervision.

    Source: Isensee et al., arXiv 2404.09556, and its default plan for BraTS.
    """
    unet = importlib.import_module("dynamic_network_architectures.architectures.unet")
    build: Any = unet.ResidualEncoderUNet
    return build(
        input_channels=CHANNELS,
        n_stages=6,
        features_per_stage=(32, 64, 128, 256, 320, 320),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2, 2, 2),
        n_blocks_per_stage=(1, 3, 4, 6, 6, 6),
        num_classes=OUTPUTS,
        n_conv_per_stage_decoder=(1, 1, 1, 1, 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )


def _swin_unetr(side: int) -> nn.Module:
    build: Any = importlib.import_module("monai.networks.nets").SwinUNETR
    options: dict[str, Any] = {}
    if "img_size" in inspect.signature(build).parameters:  # MONAI before 1.5
        options["img_size"] = (side,) * 3
    return build(in_channels=CHANNELS, out_channels=OUTPUTS, feature_size=48, **options)


def _segresnet(side: int) -> nn.Module:
    build: Any = importlib.import_module("monai.networks.nets").SegResNet
    return build(
        spatial_dims=3, init_filters=32, in_channels=CHANNELS, out_channels=OUTPUTS
    )


PEERS = {
    "nnU-Net ResEnc-L": Peer(
        "dynamic-network-architectures", "dynamic_network_architectures", _resenc, 64
    ),
    "SwinUNETR (48)": Peer("monai", "monai.networks.nets", _swin_unetr, 64),
    "SegResNet (32)": Peer("monai", "monai.networks.nets", _segresnet, 16),
}
"""By the name in tables."""


def usable_peers(record: Record, side: int) -> dict[str, Peer]:
    """Note in the record which peers are here, and give those that are.

    Args:
        record: The benchmark's record.
        side: Of the volume that they shall take.

    Returns:
        Installed peers that can take it, by name; none if peers are switched off.
    """
    found = {}
    for name, peer in PEERS.items() if record.settings.peers else ():
        missing = why_not_importable(peer.module)
        if missing:
            record.peer(name, f"not installed ({missing}): pip install {peer.package}")
        elif side < peer.least_side:
            record.peer(name, f"not measured: it needs {peer.least_side}^3 or more")
        else:
            record.peer(name, f"{peer.package} {package_version(peer.package)}")
            found[name] = peer
    return found
