"""Slabs from front to back are the whole image's logits, cut in pieces."""

from __future__ import annotations

import itertools

import pytest
import torch

from segmamba.inference.sliding_window import SlidingWindow
from segmamba.inference.windows import Sums

CPU = torch.device("cpu")


def network(batch: torch.Tensor) -> torch.Tensor:
    """Depend on the place in the window, so that every window counts."""
    ramp = torch.linspace(0, 1, batch.shape[2]).view(-1, 1, 1)
    return torch.cat([batch, batch * ramp, batch.roll(1, 3)], dim=1)


def seen(**options) -> SlidingWindow:
    settings = {"precision": "fp32", "mirror_axes": (0, 2), **options}
    return SlidingWindow([network], (4, 6, 5), CPU, CPU, **settings)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("size", [(13, 11, 9), (4, 17, 5), (3, 4, 2), (21, 6, 12)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_slabs_are_the_logits_to_the_bit(size, overlap, batch_size):
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    window = seen(overlap=overlap, batch_size=batch_size)
    expected = window.logits(image, "a")
    for cuts in ((0, size[1]), (0, size[1] // 2, size[1]), (0, 1, 3, size[1])):
        found = torch.full_like(expected, torch.nan)
        for start, stop in itertools.pairwise(cuts):
            ends = [0]
            rows = slice(start, stop)
            for part, slab in window.slabs(image, rows, rows):
                found[:, part, start:stop] = slab
                assert part.start == ends[-1]
                ends.append(part.stop)
            assert ends[-1] == size[0]
        assert torch.equal(found, expected)


def test_a_box_as_deep_as_a_window_is_all_that_is_held(monkeypatch):
    held = []
    add = Sums.add

    def watched(self, windows, logits):
        add(self, windows, logits)
        held.append(tuple(self._total.shape))

    monkeypatch.setattr(Sums, "add", watched)
    rows = slice(10, 20)
    for _ in seen().slabs(torch.zeros(1, 40, 30, 7), rows, rows):
        pass
    assert set(held) == {(3, 4, 10, 7)}


def test_weights_that_are_announced_add_up_to_one():
    total = torch.zeros(1)
    image = torch.zeros(1, 9, 4, 13)

    def note(weights: torch.Tensor) -> None:
        assert weights.shape[1:] == (4, 6, 5)
        total.add_(weights.sum())

    window = seen(on_windows=note, batch_size=3)
    window.logits(image, "a")
    assert total.item() == pytest.approx(9 * 4 * 13, rel=1e-5)
    total.zero_()
    for start, stop in ((0, 1), (1, 4)):  # neighbours may share rows
        rows = slice(max(start - 1, 0), stop)
        assert list(window.slabs(image, rows, slice(start, stop)))
    assert total.item() == pytest.approx(9 * 4 * 13, rel=1e-5)
