"""The networks of other papers are theirs; their configurations are checked."""

from __future__ import annotations

import sys

import pytest
import torch

from segmamba.config import PEER_NAMES, NetworkConfig, PeerConfig, network_from_dict
from segmamba.errors import BackendUnavailableError, ConfigError
from segmamba.nn import (
    build_network,
    count_parameters,
    create_network,
    preset_config,
    preset_names,
)
from segmamba.nn.peers.from_nnunet import kernel_sizes
from segmamba.training.losses import build_loss


@pytest.mark.parametrize(
    ("name", "in_channels", "out_channels", "millions", "digits"),
    [
        # The tables of arXiv 2209.15076 and 2303.05785 (one channel, 14 classes)
        ("unet", 1, 14, 31.2, 1),
        ("uxnet", 1, 14, 53.0, 1),
        ("unetr", 1, 14, 92.8, 1),
        ("swinunetr", 1, 14, 62.2, 1),
        # arXiv 2303.09975, size B
        ("mednext", 1, 2, 10.5, 1),
        # arXiv 2404.09556, the larger of its two medium sizes
        ("resenc", 4, 4, 102, 0),
    ],
)
def test_parameters_are_the_published_ones(
    name, in_channels, out_channels, millions, digits
):
    options = {"patch_size": (96, 96, 96)} if name == "unetr" else {}
    network = create_network(
        name,
        in_channels=in_channels,
        out_channels=out_channels,
        deep_supervision=None,
        **options,
    )
    found = count_parameters(network) / 1e6
    if name == "mednext":  # its table leaves the deep supervision's heads out
        found -= sum(p.numel() for p in network.body.out_blocks.parameters()) / 1e6
    assert round(found, digits) == millions


def test_presets_are_segmambas_and_the_peers():
    ours = {f"segmamba{end}" for end in ("", "-v1", "-paper", "-light", "-small")}
    assert set(preset_names()) == ours | set(PEER_NAMES)


def test_plain_values_say_which_dataclass():
    config = preset_config("unet", in_channels=2)
    assert network_from_dict({"name": "unet", "in_channels": 2}) == PeerConfig(
        name="unet", in_channels=2
    )
    assert isinstance(network_from_dict({"name": "segmamba"}), NetworkConfig)
    assert build_network(PeerConfig(name="unet", in_channels=2)).config.dims == (
        config.dims
    )
    with pytest.raises(ConfigError, match="unknown key 'd_state'"):
        network_from_dict({"name": "unet", "d_state": 8})
    with pytest.raises(ConfigError, match="unknown key 'patch_size'"):
        network_from_dict({"name": "segmamba", "patch_size": [8, 8, 8]})


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("unet", {"d_state": 8}, "no setting 'd_state'"),
        ("unet", {"hidden_size": 8}, "no setting 'hidden_size'"),
        ("unet", {"dims": (8,)}, "2 to 8 stages"),
        ("unet", {"dims": (8, 0)}, "numbers of 1 or more"),
        ("unet", {"depths": (1, 1)}, "6 entries"),
        ("unet", {"strides": (2, 2)}, "5 entries"),
        ("unet", {"strides": (0, 2, 2, 2, 2)}, "strides"),
        ("unet", {"width": 3}, "unknown setting"),
        ("unet", {"dimz": (3, 3)}, "Did you mean 'dims'"),
        ("uxnet", {"strides": (2, 2)}, "4 entries"),
        ("uxnet", {"in_channels": 0}, "in_channels"),
        ("segresnet", {"dims": (8, 8)}, "no setting 'dims'"),
        ("segresnet", {"base_channels": 12}, "multiple of 8"),
        ("segresnet", {"deep_supervision": True}, "no setting 'deep_supervision'"),
        ("swinunetr", {"base_channels": 16}, "multiple of 12"),
        ("swinunetr", {"depths": (2, 2)}, "4 entries"),
        ("swinunetr", {"strides": (2,) * 4}, "no setting 'strides'"),
        ("unetr", {"patch_size": (96, 96, 90)}, "multiples of 16"),
        ("unetr", {"hidden_size": 100}, "multiple of 12"),
        ("unetr", {"depths": (12,)}, "no setting 'depths'"),
        ("mednext", {"checkpointing": True}, "no setting 'checkpointing'"),
        ("mednext", {"depths": (1,) * 4}, "5 entries"),
    ],
)
def test_what_means_nothing_is_refused(name, options, word):
    with pytest.raises(ConfigError, match=word):
        preset_config(name, **options)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("swinunetr", "monai.networks.nets.swin_unetr", "monai"),
        ("mednext", "monai.networks.nets.mednext", "monai"),
        ("unet", "dynamic_network_architectures.architectures.unet", "nnunet"),
        ("resenc", "dynamic_network_architectures.architectures.unet", "nnunet"),
    ],
)
def test_a_missing_package_is_named(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=rf"segmamba\[{extra}\]"):
        create_network(name, in_channels=1, out_channels=2)


def test_stages_follow_the_dims():
    config = preset_config("resenc", dims=(8, 8, 8))
    assert config.depths == (1, 3, 4)
    assert len(config.strides) == 2
    config = preset_config("uxnet", dims=(8,) * 5)
    assert config.depths == (2,) * 5
    assert len(config.strides) == 5


@pytest.mark.parametrize(
    ("strides", "kernels"),
    [
        ([(2, 2, 2)] * 2, [(3, 3, 3)] * 3),
        (
            [(1, 2, 2), (1, 2, 2), (2, 2, 2)],
            [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)],
        ),
        ([(2, 2, 2), (1, 2, 2)], [(3, 3, 3)] * 3),
    ],
)
def test_kernels_wait_for_thick_slices(strides, kernels):
    assert kernel_sizes(strides) == kernels


@pytest.mark.parametrize("name", ["unet", "mednext"])
def test_the_loss_takes_their_lists(name):
    from segmamba.data.labels import LabelScheme

    options = {"unet": {"dims": (4, 4, 4)}, "mednext": {"base_channels": 4}}[name]
    network = create_network(name, in_channels=1, out_channels=2, **options)
    outputs = network(torch.randn(2, 1, 17, 16, 20))
    assert isinstance(outputs, list)
    labels = torch.zeros(2, 17, 16, 20, dtype=torch.int16)
    labels[:, 4:12, 4:12, 4:12] = 1
    scheme = LabelScheme({"background": 0, "ball": 1})
    loss = build_loss("dice_ce", scheme)(outputs, labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in network.parameters())
