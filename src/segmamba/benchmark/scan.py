"""The selective scan alone, beside mamba_ssm's kernel."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segmamba.benchmark.checks import (
    LIMITS,
    different_bits,
    poisoned_memory,
    relative_error,
    relative_errors,
)
from segmamba.benchmark.environment import package_version, why_not_importable
from segmamba.benchmark.record import OURS, Record
from segmamba.benchmark.settings import BenchmarkSettings
from segmamba.benchmark.timing import Run, captured
from segmamba.errors import SegMambaError, describe
from segmamba.ops import selective_scan

Scan = Callable[..., Tensor]

PEER = "mamba_ssm"
STATES = 16

LENGTHS = (512, 4096, 32768, 262144, 1048576)
"""Steps L."""

WIDTHS = ((1, 64), (1, 256), (1, 1024), (2, 2048))
"""Batch and channels D."""

QUICK_LENGTHS, QUICK_WIDTHS = (16, 65), ((1, 8), (2, 4))

MAX_ELEMENTS = {"cuda": 2**31 - 1, "cpu": 2**25}
"""Numbers in u beyond which a size is left out: 32-bit offsets on a GPU, and minutes of
waiting on a CPU."""

FULL_TENSORS = 6
"""u, delta, the output and their gradients: the least that a size needs."""

CHECKED = (2, 7, 389)
"""Batch, channels and steps of the check, all odd but the batch."""


def benchmark_scan(record: Record) -> None:
    """Time forward, and forward with backward, over lengths and widths.

    u, delta, B and C are of the benchmark's type, A, D and the bias float32; with
    softplus, skip and bias, without gate. On a GPU also as replays of a CUDA graph:
    short sequences take Python longer to launch than the GPU to scan.

    Args:
        record: Where the rows go, mamba_ssm's beside ours where it is installed.
    """
    settings = record.settings
    scans = _scans(record)
    limit = LIMITS[settings.precision]
    for subject, scan in list(scans.items()):

        def find(scan: Scan = scan, own: bool = subject == OURS) -> dict[str, float]:
            return _errors(scan, settings, own)

        if not record.check(f"scan of {subject}", find, limit, peer=subject != OURS):
            del scans[subject]
    for batch, channels, length in _sizes(settings):
        _time_size(record, scans, batch, channels, length)


def _scans(record: Record) -> dict[str, Scan]:
    """Our scan, and mamba_ssm's where it is installed."""
    backend = record.settings.backend

    def ours(*inputs: Tensor) -> Any:
        u, delta, A, B, C, D, bias = inputs
        return selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)

    scans: dict[str, Scan] = {OURS: ours}
    if not record.settings.peers:
        return scans
    peer, state = mamba_scan(record.device)
    record.peer(PEER, state)
    return {**scans, PEER: peer} if peer else scans


def mamba_scan(device: torch.device) -> tuple[Scan | None, str]:
    """Find mamba_ssm's scan: its function, or its compiled extension alone.

    Args:
        device: Where it shall run; it knows CUDA only.

    Returns:
        From (u, delta, A, B, C, D, bias) to the output, or None; and what was found.
    """
    module, extension = "mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda"
    if device.type != "cuda":
        return None, "not measured: its kernel needs a GPU"
    version = package_version("mamba-ssm") or "of unknown version"
    if not why_not_importable(module):
        function = importlib.import_module(module).selective_scan_fn

        def scan(*inputs: Tensor) -> Tensor:
            u, delta, A, B, C, D, bias = inputs
            return function(u, delta, A, B, C, D, None, bias, True)

        return scan, f"mamba-ssm {version}"
    reason = why_not_importable(extension)
    if reason:
        return None, f"not installed ({reason})"
    ExtensionScan.extension = importlib.import_module(extension)
    return ExtensionScan.apply, f"mamba-ssm's extension alone, {version}"


class ExtensionScan(torch.autograd.Function):
    """mamba_ssm's compiled kernels without its Python package."""

    extension: Any = None

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Scan; inputs as those of `mamba_scan`'s result."""
        u, delta, A, B, C, D, bias = inputs
        rows = u, delta, A, B.unsqueeze(1), C.unsqueeze(1), D, None, bias
        out, states, *_ = ExtensionScan.extension.fwd(*rows, True)
        ctx.save_for_backward(*inputs, states)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Give the gradients of all seven inputs."""
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        grad = gradients[0].contiguous()
        rows = u, delta, A, B.unsqueeze(1), C.unsqueeze(1), D, None, bias
        du, ddelta, dA, dB, dC, dD, dbias, *_ = ExtensionScan.extension.bwd(
            *rows, grad, states, None, None, True, False
        )
        dB, dC = dB.squeeze(1).to(B.dtype), dC.squeeze(1).to(C.dtype)
        return du, ddelta, dA, dB, dC, dD, dbias


@dataclass(frozen=True)
class Inputs:
    """What a scan takes, and the weights of its output in the sum derived from."""

    tensors: tuple[Tensor, ...]
    weight: Tensor

    NAMES = ("u", "delta", "A", "B", "C", "D", "bias")

    @classmethod
    def draw(
        cls, settings: BenchmarkSettings, batch: int, channels: int, length: int
    ) -> Inputs:
        """Draw inputs on the device."""
        place, dtype = settings.place, settings.torch_dtype
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=place, dtype=dtype)

        rates = torch.arange(1, STATES + 1, device=place, dtype=torch.float32)
        tensors = (
            normal(batch, channels, length),
            normal(batch, channels, length),
            -rates.expand(channels, STATES).contiguous(),
            normal(batch, STATES, length),
            normal(batch, STATES, length),
            torch.ones(channels, device=place),
            torch.full((channels,), -4.0, device=place),
        )
        return cls(tensors, normal(batch, channels, length))

    def exact(self) -> Inputs:
        """The same in float64."""
        tensors = tuple(x.detach().double() for x in self.tensors)
        return Inputs(tensors, self.weight.double())

    def forward(self, scan: Scan) -> Tensor:
        """Scan without gradient."""
        with torch.no_grad():
            return scan(*self.tensors)

    def outputs(self, scan: Scan) -> Tensor:
        """Scan, and find all gradients; give the output."""
        return self.backward(scan)["output"]

    def backward(self, scan: Scan) -> dict[str, Tensor]:
        """Scan; give the output and all gradients."""
        leaves = [x.detach().requires_grad_() for x in self.tensors]
        output = scan(*leaves)
        gradients = torch.autograd.grad(output, leaves, self.weight)
        named = dict(zip(self.NAMES, gradients, strict=True))
        return {**named, "output": output.detach()}


def _errors(scan: Scan, settings: BenchmarkSettings, own: bool) -> dict[str, float]:
    """Errors against the float64 loop; ours with memory poisoned, and twice alike."""
    inputs = Inputs.draw(settings, *CHECKED)

    def loop(*tensors: Tensor) -> Any:
        u, delta, A, B, C, D, bias = tensors
        return selective_scan(
            u, delta, A, B, C, D, None, bias, True, backend="reference"
        )

    expected = inputs.exact().backward(loop)
    if not own:
        return relative_errors(inputs.backward(scan), expected)
    with poisoned_memory():
        errors = relative_errors(inputs.backward(scan), expected)
    first, second = (list(inputs.backward(scan).values()) for _ in range(2))
    return {**errors, "different bits in two runs": different_bits(first, second)}


def _sizes(settings: BenchmarkSettings) -> Iterator[tuple[int, int, int]]:
    """Batch, channels and steps, the cheap ones first."""
    widths = QUICK_WIDTHS if settings.quick else WIDTHS
    lengths = QUICK_LENGTHS if settings.quick else LENGTHS
    sizes = [(*width, length) for width in widths for length in lengths]
    yield from sorted(sizes, key=lambda size: size[0] * size[1] * size[2])


def _time_size(
    record: Record, scans: dict[str, Scan], batch: int, channels: int, length: int
) -> None:
    settings = record.settings
    case = f"B {batch}, D {channels}, L {length}"
    reason = _why_too_large(record, batch * channels * length)
    modes = ["forward", "forward+backward"]
    if record.device.type == "cuda":
        modes += [f"{mode}, CUDA graph" for mode in modes]
    for mode in modes:
        for subject, scan in scans.items():
            facts = {"shape": [batch, channels, length]}
            if reason:
                record.add(subject, case, mode, status="skipped", note=reason, **facts)
                continue

            def make(scan: Scan = scan, mode: str = mode) -> Run:
                inputs = Inputs.draw(settings, batch, channels, length)
                back = mode.startswith("forward+backward")
                call = inputs.outputs if back else inputs.forward
                if "graph" not in mode:
                    return lambda: call(scan)
                return _replay(lambda: call(scan), LIMITS[settings.precision])

            record.time(subject, case, mode, make, **facts)


def _replay(run: Callable[[], Tensor], limit: float) -> Run:
    """Give the replay of a call as a CUDA graph: the GPU's time without Python's."""
    expected = run()
    replay, output = captured(run)
    output.detach().fill_(math.nan)
    replay()
    error = relative_error(output, expected)
    if not error <= limit:
        raise SegMambaError(
            describe("the graph's answer isn't the scan's", found=error)
        )
    return replay


def _why_too_large(record: Record, elements: int) -> str:
    limit = MAX_ELEMENTS.get(record.device.type, MAX_ELEMENTS["cpu"])
    if elements > limit:
        return f"more than {limit} numbers in u"
    if record.device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(record.device).total_memory
    need = FULL_TENSORS * elements * record.settings.torch_dtype.itemsize
    return f"needs more than {need / 2**30:.0f} GiB" if need > 0.9 * total else ""
