"""Mixers against loops, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from segmamba.errors import ConfigError
from segmamba.nn import create_network, preset_config
from segmamba.nn.mixers import (
    LargeKernelConvolution,
    SelfAttention,
    WindowAttention,
    attention_heads,
    build_mixer,
)


def tokens_of(size: tuple[int, int, int], channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    length = size[0] * size[1] * size[2]
    return torch.randn(2, length, channels, generator=generator).double()


def attend_one(mixer, tokens: Tensor, weights) -> Tensor:
    """Attention, one token and one head at a time; weights(i, j, head) or None."""
    batch, length, channels = tokens.shape
    qkv = mixer.qkv(tokens).view(batch, length, 3, mixer.heads, -1)
    mixed = torch.zeros(batch, length, channels, dtype=tokens.dtype)
    width = channels // mixer.heads
    for case, i, head in itertools.product(
        range(batch), range(length), range(mixer.heads)
    ):
        seen = [j for j in range(length) if weights(i, j, head) is not None]
        query = qkv[case, i, 0, head]
        logits = torch.stack(
            [
                query @ qkv[case, j, 1, head] / width**0.5 + weights(i, j, head)
                for j in seen
            ]
        )
        values = torch.stack([qkv[case, j, 2, head] for j in seen])
        mixed[case, i, head * width : (head + 1) * width] = logits.softmax(0) @ values
    return mixer.out_proj(mixed)


def test_self_attention_is_the_loop():
    size = (2, 3, 3)
    mixer, tokens = SelfAttention(32).double(), tokens_of(size, 32)
    assert mixer.heads == 2
    with torch.no_grad():
        wanted = attend_one(mixer, tokens, lambda i, j, head: 0.0)
        torch.testing.assert_close(mixer(tokens, size), wanted)


@pytest.mark.parametrize(
    ("size", "shift"),
    [
        ((6, 3, 3), 0),  # windows fit; two axes are one window
        ((6, 4, 3), 1),  # shifted along two axes, padded along one
        ((2, 5, 4), 1),  # shorter than a window along one
    ],
)
def test_window_attention_is_the_loop(size, shift):
    window, channels = 3, 16
    mixer = WindowAttention(channels, shift=shift, window=window).double()
    torch.nn.init.normal_(mixer.position_bias)
    places = list(itertools.product(*map(range, size)))

    def room(place):
        """Which window a voxel is in, the shifted grid starting before the map."""
        return tuple(
            (at - shift if side > window else at) // min(side, window)
            for at, side in zip(place, size, strict=True)
        )

    def weights(i, j, head):
        if room(places[i]) != room(places[j]):
            return None
        apart = [a - b + window - 1 for a, b in zip(places[i], places[j], strict=True)]
        return mixer.position_bias[(head, *apart)]

    tokens = tokens_of(size, channels)
    with torch.no_grad():
        wanted = attend_one(mixer, tokens, weights)
        torch.testing.assert_close(mixer(tokens, size), wanted)


def test_the_large_kernel_is_the_loop():
    size, kernel = (3, 4, 5), 3
    mixer = LargeKernelConvolution(4, kernel).double()
    tokens = tokens_of(size, 4)
    volume = tokens.view(2, *size, 4)
    mixed = torch.zeros_like(volume)
    for place in itertools.product(*map(range, size)):
        total = mixer.conv.bias.expand(2, 4).clone()
        for step in itertools.product(range(kernel), repeat=3):
            at = [p + s - 1 for p, s in zip(place, step, strict=True)]
            if all(0 <= a < side for a, side in zip(at, size, strict=True)):
                total = (
                    total
                    + mixer.conv.weight[(slice(None), 0, *step)]
                    * (volume[(slice(None), *at)])
                )
        mixed[(slice(None), *place)] = total
    wanted = mixer.out_proj(mixed.view(2, -1, 4))
    torch.testing.assert_close(mixer(tokens, size), wanted)


def test_windows_shift_in_every_other_layer():
    assert build_mixer("window-attention", 16, 0).shift == 0
    assert build_mixer("window-attention", 16, 1).shift == 3


@pytest.mark.parametrize(
    ("channels", "heads"), [(48, 3), (384, 24), (8, 1), (40, 2), (52, 2)]
)
def test_heads_divide_the_channels(channels, heads):
    assert attention_heads(channels) == heads
    assert channels % heads == 0


@pytest.mark.parametrize(
    "mixer", ["large-kernel", "window-attention", "self-attention"]
)
def test_networks_with_other_mixers(mixer):
    network = create_network(
        "segmamba",
        in_channels=1,
        out_channels=2,
        dims=(4, 8),
        depths=(2, 1),
        hidden_size=8,
        mixer=mixer,
    )
    assert network.config.mixer == mixer
    image = torch.randn(1, 1, 17, 20, 33)
    logits = network(image)
    assert logits.shape == (1, 2, 17, 20, 33)
    logits.square().mean().backward()
    layers = {k: p for k, p in network.named_parameters() if ".mixer." in k}
    assert layers
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layers.values())
    with torch.no_grad():
        program = torch.export.export(network.eval(), (image,))
        torch.testing.assert_close(
            program.module()(image), network(image), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [("d_state", 8), ("orientations", ("forward",)), ("num_slices", (4, 4, 4, 4))],
)
def test_settings_of_a_scan_that_is_not_there_are_refused(option, value):
    assert preset_config("segmamba", **{option: value})
    with pytest.raises(ConfigError, match=f"bad {option}.*has no scan"):
        preset_config("segmamba", mixer="large-kernel", **{option: value})
