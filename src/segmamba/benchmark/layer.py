"""The three-directional layer at the four stages of the published network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from segmamba.benchmark.checks import (
    LIMITS,
    different_bits,
    float64_copy,
    poisoned_memory,
    relative_errors,
    set_backend,
)
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.timing import Run, captured
from segmamba.devices import autocast
from segmamba.errors import SegMambaError, describe
from segmamba.nn.mamba import TriOrientatedMamba
from segmamba.types import Size3

STAGES = ((48, 64), (96, 32), (192, 16), (384, 8))
"""Channels, and side of the feature map, of each stage for a 128^3 input."""

QUICK_STAGES = ((8, 8), (16, 4))

CHECK_SIZE: Size3 = (5, 7, 11)
"""Map of the first stage's check: an odd number of tokens, more than a kernel takes at
once."""

LATER_CHECK_SIZE: Size3 = (3, 5, 9)
"""The same for later stages, which have more channels: the loop's backward takes time
by the square of the tokens."""

QUICK_CHECK_SIZE: Size3 = (3, 5, 3)


def benchmark_layer(record: Record) -> None:
    """Check, then time in_proj, tri-orientated scan and out_proj at each stage.

    Args:
        record: Where the rows go; batches of 1 and 2, forward without gradient, and
            forward with backward (gradients of tokens and parameters); on a GPU also
            both as replays of a CUDA graph, which show what launches cost.
    """
    settings = record.settings
    stages = QUICK_STAGES if settings.quick else STAGES
    for number, (channels, side) in enumerate(stages, start=1):
        layer = Layer(channels, settings)
        small = CHECK_SIZE if number == 1 else LATER_CHECK_SIZE
        small = QUICK_CHECK_SIZE if settings.quick else small
        find = functools.partial(_errors, layer, small, side)
        if record.check(f"stage {number}", find, LIMITS[settings.precision]):
            for batch in (1, 2):
                _time(record, layer, number, batch, side)


def _errors(layer: Layer, small: Size3, side: int) -> dict[str, float]:
    bits = layer.different_bits((side, side, side))
    return {**layer.errors(small), "different bits in two runs": bits}


def _time(record: Record, layer: Layer, stage: int, batch: int, side: int) -> None:
    size = (side, side, side)
    modes = {"forward": layer.forward_run, "forward+backward": layer.backward_run}
    if record.device.type == "cuda":
        modes["forward, CUDA graph"] = layer.forward_graph
        modes["forward+backward, CUDA graph"] = layer.backward_graph
    for mode, make in modes.items():
        record.time(
            OURS,
            f"stage {stage}, batch {batch}",
            mode,
            lambda make=make: make(batch, size),
            tokens=[batch, side**3, layer.channels],
        )


class Layer:
    """A layer with drawn weights, and the calls that are timed."""

    def __init__(self, channels: int, settings: BenchmarkSettings) -> None:
        self.channels, self.settings = channels, settings
        torch.manual_seed(0)
        module = TriOrientatedMamba(channels).to(settings.place)
        self.module = set_backend(module, settings.backend)

    def draw(self, batch: int, size: Size3) -> Tensor:
        """Draw tokens, (batch, L, channels), in the benchmark's type."""
        generator = torch.Generator().manual_seed(batch)
        length = size[0] * size[1] * size[2]
        tokens = torch.randn(batch, length, self.channels, generator=generator)
        return tokens.to(self.settings.place, self.settings.torch_dtype)

    def forward_run(self, batch: int, size: Size3) -> Run:
        """Give the forward pass, without gradient."""
        tokens = self.draw(batch, size)

        def run() -> None:
            with torch.no_grad(), self._autocast():
                self.module(tokens, size)

        return run

    def backward_run(self, batch: int, size: Size3) -> Callable[[], dict[str, Tensor]]:
        """Give the forward and backward pass."""
        tokens = self.draw(batch, size).requires_grad_()
        weight = self.draw(batch, size)
        return lambda: self.gradients(tokens, weight, size)

    def forward_graph(self, batch: int, size: Size3) -> Run:
        """Give the forward pass as a CUDA graph's replay."""
        return captured(self.forward_run(batch, size))[0]

    def backward_graph(self, batch: int, size: Size3) -> Run:
        """Give forward and backward as a replay, whose results are the plain ones."""
        run = self.backward_run(batch, size)
        expected = {name: x.clone() for name, x in run().items()}
        replay, found = captured(run)
        replay()
        bits = different_bits(list(found.values()), list(expected.values()))
        if bits:
            problem = "the graph's answer isn't the layer's"
            raise SegMambaError(describe(problem, found=f"{bits} different results"))
        return replay

    def gradients(
        self, tokens: Tensor, weight: Tensor, size: Size3
    ) -> dict[str, Tensor]:
        """Give the output and all gradients of its sum weighted by `weight`."""
        self.module.zero_grad(set_to_none=True)
        tokens.grad = None
        with self._autocast():
            output = self.module(tokens, size)
        output.backward(weight.to(output.dtype))
        return _results(self.module, output, tokens)

    def errors(self, size: Size3) -> dict[str, float]:
        """Compare with the float64 loop, with memory poisoned and without.

        Args:
            size: Of the small map.

        Returns:
            The worse error of output, "tokens" (their gradient) and each parameter's
            gradient.
        """
        tokens, weight = self.draw(2, size).requires_grad_(), self.draw(2, size)
        expected = self._reference(tokens, weight, size)
        with poisoned_memory():
            poisoned = self.gradients(tokens, weight, size)
        errors = relative_errors(poisoned, expected)
        plain = relative_errors(self.gradients(tokens, weight, size), expected)
        return {key: max(value, plain[key]) for key, value in errors.items()}

    def different_bits(self, size: Size3) -> int:
        """Count results whose bits differ in two runs at full size."""
        tokens, weight = self.draw(1, size).requires_grad_(), self.draw(1, size)
        first, second = (
            list(self.gradients(tokens, weight, size).values()) for _ in range(2)
        )
        return different_bits(first, second)

    def _reference(
        self, tokens: Tensor, weight: Tensor, size: Size3
    ) -> dict[str, Tensor]:
        exact = float64_copy(self.module, "reference", tokens.device)
        rows = tokens.detach().double().requires_grad_()
        output = exact(rows, size)
        output.backward(weight.double())
        return _results(exact, output, rows)

    def _autocast(self):
        return autocast(self.settings.place, self.settings.precision)


def _results(
    module: torch.nn.Module, output: Tensor, tokens: Tensor
) -> dict[str, Tensor]:
    gradients = {name: item.grad for name, item in module.named_parameters()}
    named = {"output": output.detach(), "tokens": tokens.grad, **gradients}
    return {name: x for name, x in named.items() if x is not None}
