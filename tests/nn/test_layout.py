"""The layout of a network's memory on a GPU, as far as a CPU can show it."""

from __future__ import annotations

import torch

from segmamba.nn import create_network
from segmamba.nn.segmamba import _arrange_kernels, _channels_last

LAST = torch.channels_last_3d


def small_network() -> torch.nn.Module:
    torch.manual_seed(1)
    return create_network(
        "segmamba", in_channels=1, out_channels=2, dims=(8, 12, 16, 20), hidden_size=24
    )


def test_kernels_change_their_layout_and_nothing_else():
    network, other = small_network(), small_network()
    _arrange_kernels(other, channels_last=True)
    kernels = [p for p in other.parameters() if p.dim() == 5]
    assert len(kernels) > 20
    assert all(p.is_contiguous(memory_format=LAST) for p in kernels)
    assert any(not p.is_contiguous() for p in kernels)
    for (name, true), (same, found) in zip(
        network.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(true, found)
    network.load_state_dict(other.state_dict())
    assert all(p.is_contiguous() for p in network.parameters())
    _arrange_kernels(other, channels_last=False)
    assert all(p.is_contiguous() for p in other.parameters())


def test_images_of_any_channels_make_convolutions_channels_last():
    """Strides of a single channel are ambiguous; convolutions go by them."""
    for channels in (1, 3):
        x = torch.randn(2, channels, 4, 5, 6)
        y = _channels_last(x)
        assert torch.equal(x, y)
        features = torch.nn.Conv3d(channels, 8, 3)(y)
        assert features.is_contiguous(memory_format=LAST)
        assert not features.is_contiguous()


def test_the_whole_network_keeps_channels_last(monkeypatch):
    """Each norm sees channels-last features, so that a GPU's kernels take them all."""
    import segmamba.nn.blocks as blocks
    import segmamba.nn.segmamba as whole

    network, seen = small_network(), []
    _arrange_kernels(network, channels_last=True)
    norm = blocks.instance_norm

    def watched(x, **options):
        residual = options.get("residual")
        seen.extend(t for t in (x, residual) if t is not None)
        return norm(x, **options)

    monkeypatch.setattr(blocks, "instance_norm", watched)
    monkeypatch.setattr(whole, "instance_norm", watched)
    with torch.no_grad():
        network(_channels_last(torch.randn(2, 1, 32, 32, 32)))
    assert len(seen) > 40
    assert all(x.is_contiguous(memory_format=LAST) for x in seen)
