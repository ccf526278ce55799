"""nnU-Net's U-Nets: the only module that imports dynamic_network_architectures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from segmamba.config import PeerConfig
from segmamba.errors import BackendUnavailableError, describe
from segmamba.types import Size3

_STYLE = {
    "conv_op": nn.Conv3d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
"""What nnU-Net's planner asks of both networks."""


def build_from_nnunet(config: PeerConfig) -> nn.Module:
    """Build nnU-Net's plain or residual-encoder U-Net, with its random weights.

    Args:
        config: A complete configuration.

    Returns:
        The network, which takes multiples of its strides. With deep supervision it
        gives a list of logits, full resolution first, in evaluation too.

    Raises:
        BackendUnavailableError: dynamic-network-architectures is missing.
    """
    try:
        from dynamic_network_architectures.architectures.unet import (
            PlainConvUNet,
            ResidualEncoderUNet,
        )
    except ImportError as error:
        raise BackendUnavailableError(
            describe(
                f"{config.name} needs dynamic-network-architectures",
                found=str(error),
                remedy="pip install 'segmamba[nnunet]'",
            )
        ) from error
    dims, depths = config.dims or (), config.depths or ()
    strides = ((1, 1, 1), *(config.strides or ()))
    common = {
        "n_stages": len(dims),
        "features_per_stage": dims,
        "kernel_sizes": kernel_sizes(config.strides or ()),
        "strides": strides,
        "num_classes": config.out_channels,
        "deep_supervision": config.deep_supervision,
        **_STYLE,
    }
    if config.name == "resenc":
        network = ResidualEncoderUNet(
            config.in_channels,
            n_blocks_per_stage=depths,
            n_conv_per_stage_decoder=(1,) * (len(dims) - 1),
            **common,
        )
    else:
        network = PlainConvUNet(
            config.in_channels,
            n_conv_per_stage=depths,
            n_conv_per_stage_decoder=depths[:-1][::-1],
            **common,
        )
    network.apply(network.initialize)
    if not config.deep_supervision:  # heads that no gradient would reach
        for level in range(len(dims) - 2):
            network.decoder.seg_layers[level] = nn.Identity()
    _drop_second_names(network)
    return network


def _drop_second_names(network: nn.Module) -> None:
    """Leave each weight one name, for files that may hold none twice.

    The decoder knows the encoder, and blocks their layers, without calling them so.
    """
    del network.get_submodule("decoder").encoder
    for module in list(network.modules()):
        called = getattr(module, "all_modules", None)
        for name, child in list(module.named_children()):
            if called is not None and any(child is layer for layer in called):
                delattr(module, name)


def kernel_sizes(strides: Sequence[Size3]) -> list[Size3]:
    """Give the kernel of each stage: 1 along axes that are far coarser, else 3.

    nnU-Net convolves along an axis from the stage on where its spacing is under twice
    the finest. The strides say where that is: such an axis waits to be halved while
    others already are.

    Args:
        strides: From each stage to the next.

    Returns:
        One kernel a stage.
    """
    kernels: list[Size3] = []
    started = [False, False, False]
    for stride in strides:
        waiting = max(stride) > 1
        for axis in range(3):
            started[axis] |= stride[axis] > 1 or not waiting
        depth, height, width = (3 if on else 1 for on in started)
        kernels.append((depth, height, width))
    return [*kernels, (3, 3, 3)]
