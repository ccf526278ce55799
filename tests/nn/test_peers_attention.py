"""The networks of other papers that use attention keep the networks' contract."""

from __future__ import annotations

import pytest
from network_contract import PeerContract

from segmamba.errors import GeometryError

pytestmark = pytest.mark.slow


class TestUNETR(PeerContract):
    name = "unetr"
    options = {"base_channels": 4, "hidden_size": 12, "patch_size": (32, 48, 32)}
    odd_options = {"patch_size": (48, 64, 64)}

    def test_larger_images_are_refused(self):
        network = self.build()
        with pytest.raises(GeometryError, match=r"\(32, 48, 32\) or smaller.*33"):
            network(self.image((33, 16, 16)))


class TestSwinUNETR(PeerContract):
    name = "swinunetr"
    options = {"base_channels": 12, "depths": (2, 1, 1, 1)}
    checkpointing = True
    exact_gradients = False
    small_size = (17, 18, 33)  # else all sides would be padded to 64


class TestSwinUNETRV2(TestSwinUNETR):
    name = "swinunetr-v2"
