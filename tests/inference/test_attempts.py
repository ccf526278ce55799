"""A memory that runs out: less is tried, it is said, and the answer is the same."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from segmamba.config import NetworkConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.errors import BackendUnavailableError
from segmamba.inference import attempts as attempts_module
from segmamba.inference.attempts import Attempt, Sizes, attempts
from segmamba.inference.predictor import Predictor
from segmamba.inference.windows import Sums

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PATCH = (64, 64, 64)
SCHEME = LabelScheme({"background": 0, "bright": 1})


def sizes(*image: int, outputs: int = 100) -> Sizes:
    return Sizes(image, outputs, 4, 4 * int(np.prod(image)))


def tried(*args) -> list[tuple[int, str, int]]:
    return [(way.batch_size, way.target.type, way.parts) for way in attempts(*args)]


def test_small_sums_are_whole_and_large_ones_come_in_slabs():
    assert tried(sizes(100, 100, 100), PATCH, 1, CPU)[0] == (1, "cpu", 0)
    big = sizes(700, 512, 512)
    way = next(attempts(big, PATCH, 1, CPU))
    assert way.parts == 4
    assert big.sums(PATCH, way.parts) <= attempts_module.SUMS_BYTES
    assert big.sums(PATCH, way.parts - 1) > attempts_module.SUMS_BYTES
    assert big.sums(PATCH, 0) == 100 * 700 * 512 * 512 * 4


def test_less_and_less_is_tried_on_the_cpu():
    assert tried(sizes(100, 90, 80, outputs=2), PATCH, 4, CPU) == [
        *((4, "cpu", 0), (2, "cpu", 0), (1, "cpu", 0)),
        *((1, "cpu", 1), (1, "cpu", 4), (1, "cpu", 16)),
    ]
    assert tried(sizes(100, 3, 80, outputs=2), PATCH, 1, CPU) == [
        *((1, "cpu", 0), (1, "cpu", 1)),
    ]


@pytest.mark.parametrize(
    ("free_gib", "first"), [(80, "cuda"), (6, "cuda slabs"), (1, "cpu")]
)
def test_a_gpu_sums_what_it_has_room_for(monkeypatch, free_gib, first):
    free = free_gib << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    ways = tried(sizes(300, 250, 250, outputs=60), PATCH, 2, GPU)
    expected = {"cuda": (2, "cuda", 0), "cuda slabs": (2, "cuda", 1)}
    assert ways[0] == expected.get(first, (2, "cpu", 1))
    if first != "cpu":  # fewer windows, then the CPU, then smaller slabs
        assert [way[:2] for way in ways[1:4]] == [(1, "cuda"), (1, "cpu"), (1, "cpu")]


def test_a_way_says_what_it_is():
    way = Attempt(PATCH, 2, CPU, 3)
    assert way.describe() == (
        "2 windows of 64 x 64 x 64 at once, sums on cpu, slab by slab in 3 parts of "
        "the plane"
    )


def make_predictor(network, **options) -> Predictor:
    plan = Plan(
        orientation="SPL",
        spacing_mm=(1.3, 0.9, 1.2),
        patch_size=(8, 8, 8),
        batch_size=1,
        normalization=(ChannelNormalization("none"),),
        network=NetworkConfig(),
    )
    settings = {"device": "cpu", "precision": "fp32", **options}
    return Predictor(network, plan, ["MRI"], SCHEME, **settings)


def bright(batch: torch.Tensor) -> torch.Tensor:
    return torch.cat([5 - batch, batch - 5 + batch.roll(1, 2)], dim=1)


def scan() -> np.ndarray:
    return np.random.default_rng(0).normal(5, 3, (21, 18, 25)).astype(np.float32)


def predict(network, caplog, **options) -> tuple[np.ndarray, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = make_predictor(network, **options).predict(scan(), affine=np.eye(4))
    return found.label_map, caplog.messages


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 7.11 PiB"),
    ],
    ids=["gpu", "cpu", "numpy"],
)
def test_too_many_windows_at_once_become_fewer(caplog, error):
    expected, _ = predict(bright, caplog)

    def greedy(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 1:
            raise error
        return bright(batch)

    found, messages = predict(greedy, caplog, batch_size=4)
    np.testing.assert_array_equal(found, expected)
    assert [text.partition("; ")[2] for text in messages] == [
        "going on with 2 windows of 8 x 8 x 8 at once, sums on cpu",
        "going on with 1 windows of 8 x 8 x 8 at once, sums on cpu",
    ]
    assert str(error).splitlines()[0] in messages[0]


@pytest.mark.parametrize("most", [9000, 3000])
def test_sums_that_do_not_fit_come_in_slabs(caplog, monkeypatch, most):
    expected, _ = predict(bright, caplog)
    add = Sums.add

    def bounded(self: Sums, windows, logits) -> None:
        wide = self.layout.size[2]
        if 2 * self.depth * (self.rows.stop - self.rows.start) * wide > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        add(self, windows, logits)

    monkeypatch.setattr(Sums, "add", bounded)
    found, messages = predict(bright, caplog)
    np.testing.assert_array_equal(found, expected)
    assert "slab by slab" in messages[-1]
    assert len(messages) == (1 if most == 9000 else 2)


def test_what_never_fits_is_an_error_at_the_end(caplog):
    def greedy(batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(BackendUnavailableError, match="too little memory"):
        predict(greedy, caplog, batch_size=2)
    assert len(caplog.messages) == 4


def test_a_whole_volume_is_one_window(caplog):
    shapes = []

    def network(batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(batch.shape[2:]))
        return bright(batch)

    predict(network, caplog, whole_volume=True, mirror=False)
    assert shapes == [(19, 20, 18)]
    predictor = make_predictor(bright, whole_volume=True)
    assert predictor.options["whole_volume"] is True
    assert "whole_volume" not in make_predictor(bright).options


def test_a_whole_volume_that_does_not_fit_becomes_windows(caplog):
    def network(batch: torch.Tensor) -> torch.Tensor:
        if batch.shape[2] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return bright(batch)

    expected, _ = predict(bright, caplog)
    found, messages = predict(network, caplog, whole_volume=True)
    np.testing.assert_array_equal(found, expected)
    assert "going on with 1 windows of 8 x 8 x 8" in messages[0]
