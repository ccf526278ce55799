"""Convolutions over maps of depth 2 give right gradients in bfloat16 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segmamba.nn.blocks import ResidualBlock
from segmamba.training.shallow_maps import avoid_depth_two


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 3), (3, 2, 2), (1, 2, 5)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_and_gradients_are_those_of_a_plain_convolution(size, precision):
    plain = nn.Sequential(nn.Conv3d(16, 8, 3, padding=1), nn.Conv3d(8, 4, 1)).double()
    guarded = copy.deepcopy(plain).float()
    avoid_depth_two(guarded)
    assert guarded.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(1, 16, *size)
    expected = plain(image.double())
    expected.square().sum().backward()
    for _ in range(3):
        junk = [torch.full((count,), torch.nan) for count in (10**3, 10**4, 10**5)]
        del junk  # what is not written shows
        guarded.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = guarded(image)
        found.float().square().sum().backward()
        tolerance = {"fp32": 1e-5, "bf16": 0.03}[precision]
        assert found.shape == expected.shape
        assert (found - expected).norm() < tolerance * expected.norm()
        for ours, true in zip(guarded.parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert true.grad is not None
            assert (ours.grad - true.grad).norm() < tolerance * true.grad.norm()


def test_blocks_of_one_or_two_inputs_are_guarded_too():
    block = ResidualBlock(8, 4).double()
    guarded = copy.deepcopy(block)
    avoid_depth_two(guarded)
    for depth in (2, 3):
        first, second = torch.randn(2, 1, 4, depth, 3, 5, dtype=torch.float64)
        expected = block(torch.cat((first, second), 1))
        torch.testing.assert_close(guarded(torch.cat((first, second), 1)), expected)
        torch.testing.assert_close(guarded(first, second), expected)
