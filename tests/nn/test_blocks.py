"""Blocks against independent computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import segmamba.nn.blocks as blocks
from segmamba.errors import GeometryError
from segmamba.nn.blocks import (
    FloatOnCpuConvolution,
    PaperGatedSpatialConvolution,
    Stem,
    UpBlock,
    feature_uncertainty,
)
from segmamba.nn.folding import folded_convolution as fold
from segmamba.nn.mamba import scan_orders


def test_feature_uncertainty_is_the_papers():
    z = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    mean = 1 / (1 + torch.exp(-z.mean(1, keepdim=True)))
    torch.testing.assert_close(
        feature_uncertainty(z), z + z * (1 + mean * torch.log(mean))
    )
    scale = feature_uncertainty(torch.full((1, 1, 1, 1, 1), -700.0)) / -700.0
    assert scale.item() == pytest.approx(2.0)


def test_paper_gsc_is_the_papers():
    block = PaperGatedSpatialConvolution(4).double()
    x = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64)

    def unit(convolution, value):
        return torch.relu(convolution(F.instance_norm(value)))

    product = unit(block.spatial, x) * unit(block.gate, x)
    torch.testing.assert_close(block(x), x + unit(block.fuse, product))


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (3, 1), (1, 1), (6, 2)])
def test_depthwise_stem_takes_any_channels(channels, groups):
    stem = Stem(channels, 16, (2, 2, 2), depthwise=True)
    assert stem.conv.groups == groups
    assert stem(torch.randn(1, channels, 8, 6, 4)).shape == (1, 16, 4, 3, 2)


def test_scan_orders_walk_the_axes_they_name():
    size = (2, 3, 4)
    volume = torch.arange(24).reshape(size)
    walks = {
        "forward": volume.flatten(),
        "slice": volume.permute(1, 2, 0).flatten(),
        "column": volume.permute(2, 0, 1).flatten(),
    }
    for name, walk in walks.items():
        for full, wanted in ((name, walk), (f"{name}-reverse", walk.flip(0))):
            full = "reverse" if full == "forward-reverse" else full
            ((stride, reverse),) = scan_orders([full], size)
            found = [(t % stride) * (24 // stride) + t // stride for t in range(24)]
            found = found[::-1] if reverse else found
            assert found == wanted.tolist(), full


def test_scan_orders_refuse_what_does_not_divide():
    assert scan_orders(["slice"], (4, 3, 3), num_slices=6) == [(6, False)]
    with pytest.raises(GeometryError, match="num_slices"):
        scan_orders(["slice"], (4, 3, 3), num_slices=8)


def test_large_kernels_have_finite_gradients_in_bfloat16() -> None:
    convolution = FloatOnCpuConvolution(12, 12, 7, padding=3, groups=12)
    image = torch.randn(1, 12, 4, 4, 2)
    convolution(image).square().sum().backward()
    wanted = convolution.weight.grad
    convolution.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        out = convolution(image)
    out.square().sum().backward()
    torch.testing.assert_close(convolution.weight.grad, wanted)


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_stem_on_a_gpu_gives_the_same(monkeypatch, depthwise):
    stem = Stem(3, 6, (1, 2, 2), depthwise=depthwise).double()
    x = torch.randn(2, 3, 5, 9, 8, dtype=torch.float64)
    assert stem.folds != depthwise
    wanted, folds = stem(x), []
    monkeypatch.setattr(
        blocks, "folded_convolution", lambda *a: folds.append(1) or fold(*a)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(stem(x), wanted)
    assert len(folds) == (not depthwise)


@pytest.mark.parametrize("block", ["residual", "conv"])
def test_a_skip_needs_no_joining(monkeypatch, block):
    up = UpBlock(6, 4, block=block).double()
    x = torch.randn(2, 6, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(2, 4, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    leaves, runs = (x, skip, *up.parameters()), []
    grad = torch.randn_like(skip)
    for parts in (False, True):
        monkeypatch.setattr(blocks, "convolves_parts", lambda *_, p=parts: p)
        y = up(x, skip)
        runs.append((y, *torch.autograd.grad(y, leaves, grad)))
    torch.testing.assert_close(*runs)
