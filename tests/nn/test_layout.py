"""The layout of a network's memory on a GPU, as far as a CPU can show it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segmamba.nn.segmamba as whole
from segmamba.nn import create_network
from segmamba.nn.layout import (
    arrange_kernels,
    channels_last,
    tokens_to_volume,
    volume_to_tokens,
)

LAST = torch.channels_last_3d
SMALL = {"in_channels": 1, "out_channels": 2, "dims": (8, 12, 16), "hidden_size": 24}


def small_network(**options) -> torch.nn.Module:
    torch.manual_seed(1)
    return create_network("segmamba", **{**SMALL, "strides": [2] * 3, **options})


@pytest.fixture
def gpu(monkeypatch):
    """Take CPUs for GPUs, and switch that on and off."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(whole, "wants_channels_last", lambda tensor: on)

    switch(True)
    return switch


def kernels(network: torch.nn.Module) -> list[Tensor]:
    """Those whose layouts differ."""
    found = [p for p in network.parameters() if p.dim() == 5]
    wide = [p for p in found if p[0].numel() > max(p.shape[1], p[0, 0].numel())]
    assert len(wide) > 15
    return wide


def are_channels_last(network: torch.nn.Module) -> bool:
    return all(p.is_contiguous(memory_format=LAST) for p in kernels(network))


def are_default(network: torch.nn.Module) -> bool:
    return all(p.is_contiguous() for p in kernels(network))


def as_fresh(x: Tensor) -> bool:
    """Whether strides are those of a new channels-last tensor, length one included."""
    return x.stride() == torch.empty_like(x[:], memory_format=LAST).stride()


def test_kernels_change_their_layout_and_nothing_else():
    network, other = small_network(), small_network()
    arrange_kernels(other, channels_last=True)
    assert are_channels_last(other)
    assert not are_default(other)
    for (name, true), (same, found) in zip(
        network.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(true, found)
    network.load_state_dict(other.state_dict())
    assert are_default(network)
    arrange_kernels(other, channels_last=False)
    assert are_default(other)


def test_kernels_suit_a_gpu_however_the_network_came_to_it(gpu):
    created = small_network()
    assert are_channels_last(created)
    assert are_channels_last(copy.deepcopy(created))
    gpu(False)
    moved = small_network()
    assert are_default(moved)
    plain = moved.state_dict()
    gpu(True)
    assert are_channels_last(moved.to("cpu"))
    created.load_state_dict({name: value.clone() for name, value in plain.items()})
    assert are_channels_last(created)
    created.load_state_dict(
        {name: value.contiguous() for name, value in plain.items()}, assign=True
    )
    assert are_channels_last(created)
    inside = torch.nn.Sequential(copy.deepcopy(moved))
    arrange_kernels(inside, channels_last=False)
    assert are_channels_last(inside.float()[0])


def test_kernels_get_back_the_default_on_a_cpu(monkeypatch):
    network = small_network()
    answers = iter([True, False])  # before and after the move
    monkeypatch.setattr(whole, "wants_channels_last", lambda tensor: next(answers))
    arrange_kernels(network, channels_last=True)
    assert are_default(network.to("cpu"))


def test_a_cpu_keeps_the_layout_that_its_user_chose():
    assert are_channels_last(small_network().to(memory_format=LAST).float())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_becomes_channels_last(batch, channels):
    """Strides of a single channel are ambiguous; convolutions go by them."""
    x = torch.randn(batch, channels, 4, 5, 6)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert as_fresh(y)
    assert channels_last(y).data_ptr() == y.data_ptr()
    strange = y.flatten(2).unflatten(2, (4, 5, 6))  # loses a single case's stride
    assert as_fresh(channels_last(strange))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_and_volumes_are_views_of_each_other(batch):
    size = (3, 4, 5)
    x = torch.randn(batch, 6, *size)
    tokens = volume_to_tokens(channels_last(x))
    assert tokens.stride() == (6 * 60, 6, 1)
    assert torch.equal(tokens, x.flatten(2).transpose(1, 2))
    volume = tokens_to_volume(tokens, size)
    assert torch.equal(volume, x)
    assert as_fresh(volume)
    assert volume.data_ptr() == tokens.data_ptr()
    assert torch.equal(volume_to_tokens(x.contiguous()), tokens)


def as_cudnn(convolve):
    """Give a convolution's outputs the layout that torch gives them on a GPU."""

    def answer(x, weight, *arguments, **options):
        y = convolve(x, weight, *arguments, **options)
        last = as_fresh(x) or (as_fresh(weight) and not weight.is_contiguous())
        return channels_last(y) if last else y.contiguous()

    return answer


@pytest.mark.parametrize("batch", [1, 2])
def test_the_whole_network_keeps_channels_last(monkeypatch, gpu, batch):
    """No module is given or gives another layout, so that no GPU must convert one."""
    network, wrong, seen = small_network(in_channels=2), [], []

    def watch(name, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        volumes = [x for x in (*inputs, *outputs) if isinstance(x, Tensor)]
        volumes = [x for x in volumes if x.dim() == 5]
        seen.extend(volumes)
        wrong.extend(name for x in volumes if not as_fresh(x))

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(lambda m, i, o, name=name: watch(name, i, o))
    for convolve in ("conv3d", "conv_transpose3d"):
        monkeypatch.setattr(F, convolve, as_cudnn(getattr(F, convolve)))
    with torch.no_grad():
        network(torch.randn(batch, 2, 16, 16, 32))
    assert len(seen) > 100
    assert wrong == []
