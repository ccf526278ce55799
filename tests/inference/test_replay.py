"""Replayed launches give the network's answer, or the network runs by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segmamba.inference import replay
from segmamba.inference.replay import Replayed, Replays
from segmamba.inference.sliding_window import sliding_window_logits
from segmamba.nn import create_network

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Network(nn.Module):
    """Counts its passes, which a replay leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.passes = 0

    def forward(self, batch: Tensor) -> Tensor:
        self.passes += 1
        return self.weight * batch


class Recording:
    """Stands for a graph on machines without a GPU: holds what was true on record."""

    made: list[tuple[int, ...]]

    def __init__(self, network: Network, batch: Tensor, key: object) -> None:
        self.key, self.place = key, batch.clone()
        self.weight = network.weight.data
        self.made.append(tuple(batch.shape))

    def replay(self, batch: Tensor) -> Tensor:
        self.place.copy_(batch)
        return self.weight * self.place


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that were recorded."""
    Recording.made = []
    monkeypatch.setattr(replay, "record", Recording)
    return Recording.made


def answers(replayed: Callable[..., Tensor], *batches: Tensor) -> list[float]:
    with torch.inference_mode():
        return [float(replayed(batch).sum()) for batch in batches]


def test_the_second_pass_is_recorded_and_the_rest_replayed(made):
    network = Network().eval()
    found = answers(Replayed(network), *[torch.full((3,), float(n)) for n in range(5)])
    assert found == [0, 6, 12, 18, 24]
    assert network.passes == 1
    assert made == [(3,)]
    assert not Replayed(network).has_record


def test_another_shape_and_other_weights_make_a_new_record(made):
    network = Network().eval()
    replayed = Replayed(network)
    assert answers(replayed, torch.ones(3), torch.ones(3), torch.ones(4)) == [6, 6, 8]
    assert answers(replayed, torch.ones(4), torch.ones(4)) == [8, 8]
    assert made == [(3,), (4,)]
    with torch.no_grad():
        network.weight.fill_(5.0)  # in its place, as an optimiser does
    assert answers(replayed, torch.ones(4), torch.ones(4)) == [20, 20]
    assert made == [(3,), (4,), (4,)]
    network.weight.data = torch.tensor(7.0)  # as the average of weights is swapped in
    assert answers(replayed, torch.ones(4), torch.ones(4)) == [28, 28]
    assert made == [(3,), (4,), (4,), (4,)]


def test_another_precision_makes_a_new_record(made):
    replayed = Replayed(Network().eval())
    batch = torch.ones(2)
    for _ in range(2):
        answers(replayed, batch, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers(replayed, batch, batch)
    assert made == [(2,)] * 4


def test_training_and_gradients_are_never_recorded(made):
    network = Network()
    assert answers(Replayed(network), *[torch.ones(2)] * 3) == [4, 4, 4]
    replayed = Replayed(network.eval())
    for _ in range(3):
        replayed(torch.ones(2)).sum().backward()
    assert made == []
    assert network.passes == 6


def test_forgetting_begins_anew(made):
    replayed = Replayed(Network().eval())
    answers(replayed, torch.ones(2), torch.ones(2))
    replayed.forget()
    assert answers(replayed, torch.ones(2), torch.ones(2)) == [4, 4]
    assert made == [(2,), (2,)]


@pytest.mark.parametrize(
    ("error", "again"),
    [(RuntimeError("not permitted"), False), (torch.OutOfMemoryError("full"), True)],
)
def test_what_cannot_be_recorded_runs_plainly(monkeypatch, caplog, error, again):
    tries = []

    def refuse(*_: object) -> None:
        tries.append(error)
        raise error

    monkeypatch.setattr(replay, "record", refuse)
    network = Network().eval()
    replayed = Replayed(network)
    with caplog.at_level(logging.INFO):
        assert answers(replayed, *[torch.ones(2)] * 3) == [4, 4, 4]
    assert network.passes == 3
    assert f"Network is not replayed: {error}" in caplog.text
    before = len(tries)
    answers(replayed, torch.ones(5), torch.ones(5))
    assert (len(tries) > before) == again


def test_only_ours_on_a_gpu_is_replayed():
    ours = create_network(
        "segmamba-light", in_channels=1, out_channels=2, dims=(4, 8), depths=(1, 1)
    )
    replays, gpu = Replays(), torch.device("cuda")
    assert isinstance(replays.launcher(ours, gpu), Replayed)
    assert replays.launcher(ours, gpu) is replays.launcher(ours, gpu)
    assert replays.launcher(ours, torch.device("cpu")) is ours
    other = Network()
    assert replays.launcher(other, gpu) is other


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpus_replay_gives_the_networks_logits(precision):
    network = create_network("segmamba", in_channels=4, out_channels=4).cuda().eval()
    image = torch.randn(4, 40, 50, 33, device="cuda")
    replayed = Replayed(network)
    options = {"device": "cuda", "precision": precision}
    expected = sliding_window_logits(network, image, (32, 32, 32), **options)
    for _ in range(2):
        found = sliding_window_logits(replayed, image, (32, 32, 32), **options)
        assert replayed.has_record
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.data = 0.5 * parameter.data
    expected = sliding_window_logits(network, image, (32, 32, 32), **options)
    found = sliding_window_logits(replayed, image, (32, 32, 32), **options)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@needs_gpu
def test_a_network_that_looks_at_numbers_falls_back_and_the_gpu_goes_on():
    class Looking(Network):
        def forward(self, batch: Tensor) -> Tensor:
            scale = 1.0 if float(batch.sum()) > -1e9 else 2.0
            return scale * super().forward(batch)

    replayed = Replayed(Looking().cuda().eval())
    stream = torch.cuda.current_stream()
    assert answers(replayed, *[torch.ones(3, device="cuda")] * 4) == [6, 6, 6, 6]
    assert not replayed.has_record
    assert torch.cuda.current_stream() == stream
    numbers = torch.randn(10**6, device="cuda").double().square().mean()
    assert float(numbers) == pytest.approx(1, abs=0.01)
