"""When steps are recorded and replayed; on a GPU, that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segmamba.data.augment import Batch
from segmamba.training import replay
from segmamba.training.replay import PLAIN_STEPS, GradientReplay


def batch_of(seed: int, size: int = 4) -> Batch:
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 1, size, size, size, generator=random)
    return Batch(image, (image[:, 0] > 0).to(torch.int16))


def computing(network: nn.Module):
    def compute(batch: Batch):
        network.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(batch.image), batch.label.long())
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(network.parameters(), 1.0)

    return compute


class PlayedGraph:
    """Does the recorded work again, into the places that it was recorded with."""

    def __init__(self, compute, batch, numbers, network):
        self.compute, self.batch, self.numbers = compute, batch, numbers
        self.network = network
        self.kept = [p.grad for p in network.parameters()]

    def replay(self):
        for place, number in zip(self.numbers, self.compute(self.batch), strict=True):
            place.copy_(number)
        for place, p in zip(self.kept, self.network.parameters(), strict=True):
            place.copy_(p.grad)
            p.grad = place


@pytest.fixture
def played(monkeypatch):
    def record(network, compute, batch):
        place = Batch(batch.image.clone(), batch.label.clone())
        numbers = compute(place)
        graph = PlayedGraph(compute, place, numbers, network)
        gradients = list(zip(network.parameters(), graph.kept, strict=True))
        return replay._Record(graph, place, numbers, gradients)

    monkeypatch.setattr(replay, "record", record)


def test_the_fourth_step_is_replayed_with_its_own_batch(played):
    network = nn.Conv3d(1, 2, 3, padding=1)
    replays = GradientReplay(network, computing(network), wanted=True)
    taken = [replays.takes(batch_of(i)) for i in range(PLAIN_STEPS)]
    assert not any(taken)
    for i in (8, 9):
        assert replays.takes(batch_of(i))
        loss, norm = (x.clone() for x in replays(batch_of(i)))
        found = [p.grad.clone() for p in network.parameters()]
        wanted_loss, wanted_norm = computing(network)(batch_of(i))
        assert (loss, norm) == (wanted_loss, wanted_norm)
        wanted = [p.grad for p in network.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_batches_of_another_shape_run_plainly(played):
    network = nn.Conv3d(1, 2, 3, padding=1)
    replays = GradientReplay(network, computing(network), wanted=True)
    assert [replays.takes(batch_of(i)) for i in range(5)] == [False] * 3 + [True] * 2
    assert not replays.takes(batch_of(0, size=5))


def test_nothing_is_recorded_where_it_is_not_wanted(played):
    network = nn.Conv3d(1, 2, 3, padding=1)
    replays = GradientReplay(network, computing(network), wanted=False)
    assert not any(replays.takes(batch_of(i)) for i in range(6))


def test_what_can_not_be_recorded_runs_plainly(monkeypatch, caplog):
    def record(network, compute, batch):
        compute(batch)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "record", record)
    network = nn.Conv3d(1, 2, 3, padding=1)
    replays = GradientReplay(network, computing(network), wanted=True)
    with caplog.at_level("INFO"):
        assert not any(replays.takes(batch_of(i)) for i in range(6))
    assert caplog.text.count("not permitted") == 1
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_gradients_are_the_plain_ones_on_a_gpu():
    from segmamba.nn import create_network

    torch.manual_seed(0)
    options = {"dims": (16, 32), "depths": (1, 1), "hidden_size": 48}
    network = create_network("segmamba", in_channels=1, out_channels=2, **options)
    network.cuda()
    plain = copy.deepcopy(network)
    replays = GradientReplay(network, computing(network), wanted=True)
    for i in range(8):
        batch = batch_of(i, size=16)
        batch = Batch(batch.image.cuda(), batch.label.cuda())
        taken = replays.takes(batch)
        assert taken == (i >= PLAIN_STEPS)
        loss, norm = (replays if taken else computing(network))(batch)
        wanted = computing(plain)(batch)
        torch.testing.assert_close((loss, norm), wanted)
        for p, q in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
