"""The averaged weights against the recursion in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segmamba.errors import CheckpointError
from segmamba.training.ema import WeightAverage, prediction_weights


def shifted(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)


def test_average_follows_the_recursion_with_its_warm_up():
    net = nn.Linear(2, 2)
    average = WeightAverage(net, decay=0.4)
    expected = net.weight.detach().double().clone()
    for update, keep in enumerate(
        [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4]
    ):
        shifted(net)
        average.update(update)
        expected = keep * expected + (1 - keep) * net.weight.detach().double()
    torch.testing.assert_close(average.tensors["weight"].double(), expected)


def test_counters_are_copied_and_not_averaged():
    net = nn.BatchNorm1d(2)
    average = WeightAverage(net, decay=0.9)
    net(torch.randn(4, 2))
    average.update(0)
    assert average.tensors["num_batches_tracked"] == 1


def test_network_gets_its_own_weights_back_even_after_an_error():
    net = nn.Linear(2, 2)
    average = WeightAverage(net, decay=0.9)
    before = net.weight.detach().clone()
    shifted(net)

    def validate() -> None:
        with prediction_weights(net, average):
            assert not net.training
            assert torch.equal(net.weight, before)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        validate()
    assert net.training
    assert torch.equal(net.weight, before + 1)
    assert torch.equal(average.tensors["weight"], before)


def test_shared_weights_come_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    average = WeightAverage(net, decay=0.9)
    before = net[0].weight.detach().clone()
    shifted(net)
    with average.applied(net):
        assert torch.equal(net[1].weight, before)
    assert torch.equal(net[0].weight, before + 1)


def test_average_of_another_network_is_refused():
    average = WeightAverage(nn.Linear(2, 2), decay=0.9)
    with pytest.raises(CheckpointError, match="weight"):
        average.load({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)})
