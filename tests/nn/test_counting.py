"""Multiply-adds and memory against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segmamba.nn import build_network, create_network, multiply_adds, preset_config
from segmamba.nn.counting import scan_multiply_adds
from segmamba.nn.footprint import LiveBytes, footprint, peak_bytes
from segmamba.nn.mamba import TriOrientatedMamba


class Ordered(nn.Module):
    """A ToM on all voxels of an image, each a token of its channels."""

    def __init__(self, mixer: TriOrientatedMamba) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, image):
        size = tuple(image.shape[2:])
        return self.mixer(image.flatten(2).transpose(1, 2), size)


def test_a_convolution_by_hand():
    layer = nn.Conv3d(4, 6, 3, padding=1, groups=2)
    assert multiply_adds(layer, (2, 4, 5, 6, 7)) == 2 * 5 * 6 * 7 * 6 * 2 * 27


def test_a_transposed_convolution_by_hand():
    layer = nn.ConvTranspose3d(4, 6, 2, 2)
    assert multiply_adds(layer, (1, 4, 5, 6, 7)) == 5 * 6 * 7 * 4 * 6 * 8


def test_a_scan_by_hand():
    # Inner channels E = 2 * 16, rank r = 1, states N = 3, taps W = 4, two directions.
    mixer = TriOrientatedMamba(16, ("forward", "slice"), d_state=3)
    tokens = 2 * 3 * 4
    convolution, projections = 32 * 4, 32 * (1 + 2 * 3) + 32 * 1
    scan = 32 * (4 * 3 + 2)
    wanted = tokens * (2 * (convolution + projections + scan) + 32)
    assert scan_multiply_adds(mixer, tokens) == wanted
    linear = tokens * (16 * 2 * 32 + 32 * 16)
    assert multiply_adds(Ordered(mixer), (1, 16, 2, 3, 4)) == wanted + linear


def test_a_network_stays_as_it_is():
    network = create_network(
        "segmamba-light", in_channels=1, out_channels=2, dims=(4, 8), depths=(0, 1)
    ).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first = multiply_adds(network, (1, 1, 16, 16, 16))
    assert multiply_adds(network, (2, 1, 16, 16, 16)) == 2 * first
    assert multiply_adds(network, (1, 1, 15, 16, 13)) == first  # padded
    assert network.training
    assert isinstance(network.stages[1].layers[0].mixer, TriOrientatedMamba)
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_network_is_the_sum_of_its_parts():
    options = {"in_channels": 1, "out_channels": 2, "dims": (4, 8), "hidden_size": 8}
    shape = (1, 1, 16, 16, 16)
    without = create_network("segmamba", depths=(0, 0), **options)
    network = create_network("segmamba", depths=(1, 0), **options)
    mixer = network.stages[0].layers[0].mixer
    extra = multiply_adds(Ordered(mixer), (1, 4, 8, 8, 8))
    assert multiply_adds(network, shape) - multiply_adds(without, shape) == extra


def test_full_attention_grows_with_the_square():
    network = create_network(
        "segmamba", in_channels=1, out_channels=2, mixer="self-attention"
    )
    bare = create_network(
        "segmamba",
        in_channels=1,
        out_channels=2,
        mixer="self-attention",
        depths=(0, 0, 0, 0),
    )
    count = multiply_adds(network, (1, 1, 32, 32, 32))
    count -= multiply_adds(bare, (1, 1, 32, 32, 32))
    wanted = sum(
        2 * (n**3 * 4 * c * c + 2 * n**6 * c)
        for n, c in zip((16, 8, 4, 2), (48, 96, 192, 384), strict=True)
    )
    assert count == wanted


def test_swin_is_as_large_as_its_paper_says():
    # 328.4 G at 96^3 and 14 classes in arXiv 2209.15076, whose tool counts norms too.
    network = create_network("swinunetr", in_channels=1, out_channels=14)
    count = multiply_adds(network, (1, 1, 96, 96, 96))
    assert count == pytest.approx(328.4e9, rel=0.04)


def test_live_bytes_by_hand():
    x = torch.empty(1000, device="meta")
    with LiveBytes([x]) as live:
        y = x.view(10, 100) * 2  # 4000 bytes; a view of x is none
        z = y + 1
        del y
        assert live.now == 4000
        w = z.sum()
    assert live.peak == 8000
    assert live.now == 4004
    assert w.shape == ()


def test_a_layer_keeps_what_its_gradient_needs():
    class Squares(nn.Module):
        config = preset_config("unet", in_channels=1)

        def forward(self, image):
            for _ in range(3):
                image = image * image
            return image

    size = (8, 8, 8)
    one = 4 * 8**3
    assert peak_bytes(Squares(), size, training=False) == 2 * one
    network = nn.Sequential(nn.Conv3d(1, 2, 1), Squares()).to("meta")
    network.config = Squares.config
    # What each square starts from is kept, and the last one's result: four maps.
    assert 4 * 2 * one <= peak_bytes(network, size, training=True) < 8 * 2 * one


@pytest.mark.parametrize("name", ["unet", "uxnet"])
def test_a_footprint_grows_with_the_network(name):
    options = {"in_channels": 2, "out_channels": 3}
    whole = footprint(preset_config(name, **options))
    half = footprint(
        preset_config(
            name,
            dims=tuple(d // 2 for d in preset_config(name).dims),
            **options,
        )
    )
    assert half.training_bytes < 0.6 * whole.training_bytes
    assert half.prediction_bytes < whole.prediction_bytes < whole.training_bytes
    network = build_network(preset_config(name, **options))
    assert whole.weights == sum(p.numel() for p in network.parameters())
