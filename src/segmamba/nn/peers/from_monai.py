"""Peers that MONAI has: the only module that imports it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from segmamba.config import PeerConfig
from segmamba.errors import BackendUnavailableError, describe


def build_from_monai(config: PeerConfig) -> nn.Module:
    """Build a peer out of MONAI's networks, with random weights.

    Args:
        config: A complete configuration.

    Returns:
        The network, which takes multiples of its strides.

    Raises:
        BackendUnavailableError: MONAI is missing, or lacks this network.
    """
    try:
        return _BUILDERS[config.name](config)
    except ImportError as error:
        raise BackendUnavailableError(
            describe(
                f"{config.name} needs MONAI",
                expected="MONAI 1.5 or newer and einops",
                found=str(error),
                remedy="pip install 'segmamba[monai]'",
            )
        ) from error


def _segresnet(config: PeerConfig) -> nn.Module:
    from monai.networks.nets.segresnet import SegResNet

    depths = config.depths or ()
    return SegResNet(
        init_filters=config.base_channels or 32,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        blocks_down=depths,
        blocks_up=(1,) * (len(depths) - 1),
    )


def _unetr(config: PeerConfig) -> nn.Module:
    from monai.networks.nets.unetr import UNETR

    assert config.patch_size is not None
    hidden = config.hidden_size or 768
    network = UNETR(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        img_size=config.patch_size,
        feature_size=config.base_channels or 16,
        hidden_size=hidden,
        mlp_dim=4 * hidden,
    )
    for block in network.vit.blocks:  # made for other networks, and never called here
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return network


def _swinunetr(config: PeerConfig) -> nn.Module:
    from monai.networks.nets.swin_unetr import SwinUNETR

    network = SwinUNETR(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        depths=config.depths or (2, 2, 2, 2),
        feature_size=config.base_channels or 48,
        use_checkpoint=config.checkpointing,
        use_v2=config.name == "swinunetr-v2",
    )
    # Its check of the size breaks compiled graphs; images are padded before they come.
    network._check_input_size = _accept_size
    return network


def _accept_size(spatial_shape: Sequence[int]) -> None:
    """Take an image of any size."""


def _mednext(config: PeerConfig) -> nn.Module:
    from monai.networks.nets.mednext import MedNeXt

    depths = config.depths or (2,) * 5
    return MedNeXt(
        init_filters=config.base_channels or 32,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        encoder_expansion_ratio=(2, 3, 4, 4),
        decoder_expansion_ratio=(4, 4, 3, 2),
        bottleneck_expansion_ratio=4,
        kernel_size=3,
        deep_supervision=config.deep_supervision,
        use_residual_connection=True,
        blocks_down=depths[:4],
        blocks_bottleneck=depths[4],
        blocks_up=depths[:4][::-1],
    )


_BUILDERS = {
    "segresnet": _segresnet,
    "unetr": _unetr,
    "swinunetr": _swinunetr,
    "swinunetr-v2": _swinunetr,
    "mednext": _mednext,
}
