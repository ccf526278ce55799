"""Networks that a file describes."""

from __future__ import annotations

import torch
from torch import nn

from segmamba.allocation import AtMost, Undrawn


def test_no_initial_weights_are_drawn() -> None:
    before = torch.get_rng_state()
    with AtMost(elements=1000, tensors=100), Undrawn():
        layers = nn.Conv3d(2, 3, 3), nn.ConvTranspose3d(3, 2, 2), nn.Linear(3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.weight.requires_grad for layer in layers] == [True] * 3
    assert layers[0].weight.shape == (3, 2, 3, 3, 3)


def test_other_functions_do_what_they_do() -> None:
    with Undrawn():
        steps = torch.arange(1, 4).add(1)
    assert steps.tolist() == [2, 3, 4]
