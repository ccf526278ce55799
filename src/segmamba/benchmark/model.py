"""The network that is timed, its calls, and its check."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segmamba.benchmark.checks import (
    GRADIENT_LIMITS,
    NETWORK_LIMITS,
    float64_copy,
    poisoned_memory,
    relative_error,
    set_backend,
)
from segmamba.benchmark.peers import CHANNELS, OUTPUTS
from segmamba.benchmark.record import Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.timing import Run, captured
from segmamba.devices import autocast
from segmamba.errors import SegMambaError, describe
from segmamba.nn import count_parameters, create_network
from segmamba.types import Size3

QUICK_NETWORK = {"dims": (8, 16), "hidden_size": 24, "depths": (1, 1)}
"""Changes of the preset for quick runs."""

# Not 32 deep: the deepest map would have two slices, of which torch's bfloat16
# convolutions on CPUs give wrong gradients (`segmamba.training.shallow_maps`).
CHECK_SIZE: Size3 = (48, 32, 32)
QUICK_CHECK_SIZE: Size3 = (11, 12, 9)


def build(settings: BenchmarkSettings, **options: Any) -> nn.Module:
    """Build preset segmamba on the device, always with the same weights.

    Args:
        settings: Device, back end, and whether a tiny network will do.
        **options: Fields of NetworkConfig.

    Returns:
        The network, in evaluation mode.
    """
    options = {**(QUICK_NETWORK if settings.quick else {}), **options}
    torch.manual_seed(0)
    with torch.device(settings.place):
        network = create_network(
            "segmamba", in_channels=CHANNELS, out_channels=OUTPUTS, **options
        )
    return set_backend(network.eval(), settings.backend)


def draw_volume(settings: BenchmarkSettings, batch: int, size: Size3) -> Tensor:
    """Draw a batch of float32 volumes, (batch, 4, D, H, W), on the device."""
    generator = torch.Generator().manual_seed(1)
    volume = torch.randn(batch, CHANNELS, *size, generator=generator)
    return volume.to(settings.place)


def draw_target(settings: BenchmarkSettings, batch: int, size: Size3) -> Tensor:
    """Draw classes, (batch, D, H, W), on the device."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(OUTPUTS, (batch, *size), generator=generator)
    return target.to(settings.place)


def inference_run(
    network: nn.Module, settings: BenchmarkSettings, volume: Tensor
) -> Run:
    """Give a forward pass without gradient."""
    network = network.to(settings.place).eval()

    @torch.inference_mode()
    def run() -> Tensor:
        with autocast(settings.place, settings.precision):
            return network(volume)

    return run


def graph_run(network: nn.Module, settings: BenchmarkSettings, volume: Tensor) -> Run:
    """Give the same as a CUDA graph's replay, checked against the plain pass.

    Raises:
        SegMambaError: The replay gives something else.
    """
    run = inference_run(network, settings, volume)
    expected = run()
    replay, output = captured(run)
    replay()
    error = relative_error(_as_tensor(output), _as_tensor(expected))
    if not error <= NETWORK_LIMITS[settings.precision]:
        raise SegMambaError(
            describe("the graph's answer isn't the network's", found=error)
        )
    return replay


def training_run(
    network: nn.Module, settings: BenchmarkSettings, volume: Tensor, target: Tensor
) -> Run:
    """Give a training step without optimiser: forward, cross-entropy, backward."""
    network = network.to(settings.place).train()

    def run() -> Tensor:
        network.zero_grad(set_to_none=True)
        with autocast(settings.place, settings.precision):
            logits = network(volume)
            loss = F.cross_entropy(logits, target)
        loss.backward()
        return logits.detach()

    return run


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Give name and parameters for the record."""
    return {"preset": "segmamba", "parameters": count_parameters(network)}


def check_network(
    record: Record, *, training: bool = False, name: str = "network", **options: Any
) -> bool:
    """Compare the network with its float64 copy on a small volume.

    The copy's scans are done by the back end "chunked", in plain PyTorch. The network
    is compared at the benchmark's precision and in float32, where limits are
    narrow.

    Args:
        record: Where the errors go.
        training: Compare gradients too, with checkpointing and without.
        name: What the check is called.
        **options: Fields of NetworkConfig.

    Returns:
        Whether all errors are within their limits.
    """
    settings = record.settings
    network = build(settings, **options)
    if not options:
        record.data["network"] = describe_network(network)
    truth = _Truth(settings, network, training, options)
    passed = True
    for precision in dict.fromkeys((settings.precision, "fp32")):
        limits = {"logits": NETWORK_LIMITS[precision]}
        if training:
            names = ("gradients", "gradients with checkpointing")
            limits |= dict.fromkeys(names, GRADIENT_LIMITS[precision])
        chosen = dataclasses.replace(settings, dtype=precision)
        passed &= record.check(
            f"{name} in {precision}",
            lambda chosen=chosen: truth.errors(chosen),
            limits,
        )
    return passed


class _Truth:
    """A network's float64 logits and gradients on a small volume."""

    def __init__(
        self,
        settings: BenchmarkSettings,
        network: nn.Module,
        training: bool,
        options: dict[str, Any],
    ) -> None:
        self.network, self.training, self.options = network, training, options
        size = QUICK_CHECK_SIZE if settings.quick else CHECK_SIZE
        self.volume = draw_volume(settings, 1, size)
        self.target = draw_target(settings, 1, size)
        # On the GPU itself, which CPUs would keep waiting for minutes.
        place = settings.place if settings.place.type == "cuda" else "cpu"
        exact = float64_copy(network, "chunked", place).train(training)
        with torch.set_grad_enabled(training):
            logits = exact(self.volume.to(place).double())
        if training:
            F.cross_entropy(logits, self.target.to(place)).backward()
            self.gradients = _gradients(exact)
        self.logits = logits.detach()

    def errors(self, settings: BenchmarkSettings) -> dict[str, float]:
        """Compare the network at a precision, with memory poisoned."""
        if not self.training:
            with poisoned_memory():
                logits = inference_run(self.network, settings, self.volume)()
            return {"logits": relative_error(_as_tensor(logits), self.logits)}
        found, logits = self._step(self.network, settings)
        saving, _ = self._step(
            build(settings, checkpointing=True, **self.options), settings
        )
        return {
            "logits": relative_error(logits, self.logits),
            "gradients": relative_error(found, self.gradients),
            "gradients with checkpointing": relative_error(saving, self.gradients),
        }

    def _step(
        self, network: nn.Module, settings: BenchmarkSettings
    ) -> tuple[Tensor, Tensor]:
        run = training_run(network, settings, self.volume, self.target)
        with poisoned_memory():
            logits = run()
        return _gradients(network), _as_tensor(logits)


def _gradients(network: nn.Module) -> Tensor:
    """All gradients as one float64 vector on the CPU."""
    found = [item.grad for item in network.parameters() if item.grad is not None]
    return torch.cat([x.detach().flatten().cpu().double() for x in found])


def _as_tensor(answer: object) -> Tensor:
    assert isinstance(answer, Tensor)
    return answer
