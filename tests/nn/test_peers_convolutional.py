"""The convolutional networks of other papers keep the networks' contract."""

from __future__ import annotations

from network_contract import PeerContract
from torch import nn


class TestUNet(PeerContract):
    name = "unet"
    options = {"dims": (4, 6, 8), "depths": (1, 2, 1), "deep_supervision": False}
    deep_supervision = True


class TestAnisotropicUNet(TestUNet):
    options = {
        "dims": (4, 6, 8),
        "depths": (1, 1, 1),
        "strides": ((1, 2, 2), (2, 2, 2)),
        "deep_supervision": False,
    }

    def test_deep_supervision_gives_every_level_in_training(self):
        network = self.build(deep_supervision=True)
        sizes = [tuple(item.shape[2:]) for item in network(self.image((7, 12, 15)))]
        assert sizes == [(7, 12, 15), (7, 6, 8)]


class TestResEnc(TestUNet):
    name = "resenc"

    def build(self, **options) -> nn.Module:
        network = super().build(**options)
        for name, parameter in network.named_parameters():
            if name.endswith(
                "conv2.all_modules.1.weight"
            ):  # starts at 0, which stops gradients
                nn.init.ones_(parameter)
        return network


class TestUXNet(PeerContract):
    name = "uxnet"
    options = {"dims": (6, 8, 12), "depths": (1, 2, 1), "hidden_size": 14}


class TestSegResNet(PeerContract):
    name = "segresnet"
    options = {"base_channels": 8, "depths": (1, 1, 1, 1)}


class TestMedNeXt(PeerContract):
    name = "mednext"
    options = {
        "base_channels": 4,
        "depths": (1, 1, 1, 1, 1),
        "deep_supervision": False,
    }
    deep_supervision = True

    def levels(self, network: nn.Module) -> int:
        return super().levels(network) + 1  # the deepest level has logits too
