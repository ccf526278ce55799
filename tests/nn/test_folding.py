"""Folded convolutions against the direct ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from segmamba.nn.folding import folded_convolution

CASES = [
    ((2, 4, 8, 6, 10), 7, (2, 2, 2)),
    ((1, 3, 7, 5, 9), 7, (2, 2, 2)),
    ((1, 1, 4, 9, 6), 7, (1, 2, 2)),
    ((1, 2, 1, 2, 3), 7, (2, 2, 2)),
    ((2, 2, 5, 7, 4), 3, (2, 1, 2)),
    ((1, 2, 8, 9, 7), 5, (3, 4, 2)),
    ((1, 2, 5, 4, 3), 1, (2, 2, 1)),
]


@pytest.mark.parametrize(("shape", "side", "stride"), CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_direct_convolution(shape, side, stride, with_bias):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, shape[1], *[side] * 3, dtype=x.dtype, requires_grad=True)
    bias = torch.randn(5, dtype=x.dtype, requires_grad=True) if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    wanted = F.conv3d(x, weight, bias, stride, side // 2)
    found = folded_convolution(x, weight, bias, stride)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
    )


def test_what_it_convolves_is_channels_last(monkeypatch):
    seen = []
    convolve = F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda *a: seen.extend(a[:2]) or convolve(*a))
    x = torch.randn(1, 4, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    folded_convolution(x, torch.randn(6, 4, 7, 7, 7), None, (2, 2, 2))
    image, kernel = seen
    assert (image.shape, kernel.shape) == ((1, 32, 7, 7, 7), (6, 32, 4, 4, 4))
    assert image.stride() == (343 * 32, 1, 49 * 32, 7 * 32, 32)
    assert kernel.stride() == (64 * 32, 1, 16 * 32, 4 * 32, 32)
