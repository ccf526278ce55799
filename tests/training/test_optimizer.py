"""The optimisers against their formulas, and their state as named tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segmamba.config import TrainConfig
from segmamba.errors import CheckpointError
from segmamba.training.optimizer import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def step(net, optimizer, times=1):
    for i in range(times):
        optimizer.zero_grad()
        net(torch.full((2, 3), float(i + 1))).square().sum().backward()
        optimizer.step()


def test_sgd_follows_the_nesterov_formula_with_decay_on_everything():
    net = nn.Linear(3, 1)
    config = TrainConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = build_optimizer(net, config)
    bias = net.bias.detach().double().clone()
    velocity = torch.zeros_like(bias)
    for _ in range(3):
        net.zero_grad()
        net(torch.ones(2, 3)).sum().backward()  # the bias has gradient 2
        gradient = 2 + 0.01 * bias
        velocity = 0.9 * velocity + gradient
        bias = bias - 0.1 * (gradient + 0.9 * velocity)
        optimizer.step()
    torch.testing.assert_close(net.bias.detach().double(), bias)


def test_adamw_decays_kernels_only():
    net = network()
    net[2].weight._no_weight_decay = True
    optimizer = build_optimizer(net, TrainConfig(optimizer="adamw"))
    decayed = [
        parameter
        for group in optimizer.param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    ]
    assert [id(item) for item in decayed] == [id(net[0].weight)]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(list(net.parameters()))


def test_every_parameter_gets_the_rate():
    optimizer = build_optimizer(network(), TrainConfig(optimizer="adamw"))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_put_back_gives_the_same_next_steps(name):
    config = TrainConfig(optimizer=name, learning_rate=1e-3)
    net = network()
    optimizer = build_optimizer(net, config)
    step(net, optimizer, 3)
    other = copy.deepcopy(net)
    fresh = build_optimizer(other, config)
    load_optimizer_tensors(fresh, other, optimizer_tensors(optimizer, net))
    step(net, optimizer, 2)
    step(other, fresh, 2)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_is_laid_out_as_its_parameter(name):
    """A step in one launch on a GPU wants the strides alike; files don't hold them."""
    net = nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)
    optimizer = build_optimizer(net, TrainConfig(optimizer=name))
    net(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    optimizer.step()
    saved = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in optimizer_tensors(optimizer, net).items()
    }
    fresh = build_optimizer(net, TrainConfig(optimizer=name))
    load_optimizer_tensors(fresh, net, saved)
    state = fresh.state[net.weight]
    for key, value in state.items():
        assert torch.equal(value, optimizer.state[net.weight][key])
        if key != "step":
            assert value.stride() == net.weight.stride() != value.contiguous().stride()


def test_names_say_what_belongs_where():
    net = network()
    optimizer = build_optimizer(net, TrainConfig())
    assert optimizer_tensors(optimizer, net) == {}
    step(net, optimizer)
    names = set(optimizer_tensors(optimizer, net))
    assert names == {f"{key}.momentum_buffer" for key, _ in net.named_parameters()}


def test_state_of_another_network_is_refused():
    net = network()
    optimizer = build_optimizer(net, TrainConfig())
    with pytest.raises(CheckpointError, match=r"7\.weight\.momentum_buffer"):
        load_optimizer_tensors(
            optimizer, net, {"7.weight.momentum_buffer": torch.zeros(1)}
        )
    with pytest.raises(CheckpointError, match=r"expected \(4, 3\), found \(1,\)"):
        load_optimizer_tensors(
            optimizer, net, {"0.weight.momentum_buffer": torch.zeros(1)}
        )
