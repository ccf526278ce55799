"""Time the three-directional layer on the CPU beside four 3x3x3 convolutions.

    python benchmarks/cpu_scan.py --out benchmarks/results/cpu_scan.json

The layer is in_proj, tri-orientated scan, out_proj with 48 channels (d_inner 96, 16
states, dt_rank 3) on 64^3 tokens; the convolutions are 48 -> 48 on as many voxels.
Everything is timed in turn, round after round, so that a busy machine slows all alike.
Nothing is timed before results and gradients agreed with the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segmamba.ops import tri_orientated_scan

CHANNELS, INNER, STATES, RANK = 48, 96, 16, 3
TOLERANCE = 1e-5


class Layer(nn.Module):
    """in_proj, scan in three orders, out_proj."""

    def __init__(self, slices: int, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float, shift: float = 0.0) -> nn.Parameter:
            value = torch.randn(*shape, generator=generator) * scale + shift
            return nn.Parameter(value.to(dtype))

        rates = torch.log(torch.arange(1, STATES + 1.0))
        self.in_proj = draw(2 * INNER, CHANNELS, scale=CHANNELS**-0.5)
        self.out_proj = draw(CHANNELS, INNER, scale=INNER**-0.5)
        shapes = (
            ((INNER, 1, 4), 0.5, 0.0),
            ((INNER,), 0.1, 0.0),
            ((RANK + 2 * STATES, INNER), INNER**-0.5, 0.0),
            ((INNER, RANK), 0.5, 0.0),
            ((INNER,), 1.0, -4.0),
            ((INNER, STATES), 0.1, 0.0),
            ((INNER,), 0.3, 1.0),
        )
        self.kinds = nn.ModuleList(
            nn.ParameterList(draw(*s, scale=a, shift=b) for _ in range(3))
            for s, a, b in shapes
        )
        with torch.no_grad():
            for rate in self.kinds[5]:
                rate += rates.to(dtype)
        self.orders = ((1, False), (1, True), (slices, False))
        self.backend = backend

    def forward(self, h: Tensor) -> Tensor:
        kinds = [list(kind) for kind in self.kinds]
        xz = F.linear(h, self.in_proj)
        y = tri_orientated_scan(xz, *kinds, orders=self.orders, backend=self.backend)
        return F.linear(y, self.out_proj)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def check(backend: str, side: int = 8) -> dict[str, float]:
    """Worst relative errors against the float64 reference at a small size."""
    results = []
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(1, side**3, CHANNELS, generator=generator)
    weight = torch.randn(1, side**3, CHANNELS, generator=generator)
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        layer = Layer(side, dtype, name)
        x = h.to(dtype).requires_grad_()
        out = layer(x)
        gradients = torch.autograd.grad(
            (out * weight.to(dtype)).sum(), [x, *layer.parameters()]
        )
        results.append((out.detach(), gradients))
    (out, found), (exact, expected) = results
    errors = {
        "output": relative_error(out, exact),
        "gradients": max(map(relative_error, found, expected)),
    }
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"no timing: wrong results, {errors}")
    return errors


def timed(run: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def measure(side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each thing in each round, after one round of warming up."""
    layer = Layer(side, torch.float32, "auto")
    h = torch.randn(1, side**3, CHANNELS)
    grad = torch.randn(1, side**3, CHANNELS)
    volume = torch.randn(1, CHANNELS, side, side, side)
    default = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
    last = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
    last = last.to(memory_format=torch.channels_last_3d)
    volume_last = volume.to(memory_format=torch.channels_last_3d)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        taken = {}
        with torch.no_grad():
            taken["forward"], _ = timed(lambda: layer(h))
            taken["conv_x4_ncdhw"], _ = timed(lambda: [default(volume) for _ in "1234"])
            taken["conv_x4_channels_last"], _ = timed(
                lambda: [last(volume_last) for _ in "1234"]
            )
        x = h.clone().requires_grad_()
        taken["forward_for_training"], out = timed(lambda x=x: layer(x))
        taken["backward"], _ = timed(lambda out=out: out.backward(grad))
        layer.zero_grad()
        del out
        if number:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    return seconds


class PeakMemory:
    """Resident memory above that at the start, sampled every two milliseconds."""

    def __enter__(self) -> PeakMemory:
        self.before = self.highest = resident_mib()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.002):
            self.highest = max(self.highest, resident_mib())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    @property
    def mib(self) -> int:
        return round(self.highest - self.before)


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE / 2**20


def own_peak(mode: str, side: int) -> int:
    """MiB that one forward, or forward and backward, needs beyond its parameters."""
    small = Layer(4, torch.float32, "auto")
    small(torch.randn(1, 64, CHANNELS)).sum().backward()
    layer = Layer(side, torch.float32, "auto")
    h = torch.randn(1, side**3, CHANNELS)
    with PeakMemory() as memory:
        if mode == "forward":
            with torch.no_grad():
                layer(h)
        else:
            layer(h.requires_grad_()).sum().backward()
    return memory.mib


def peak(mode: str, side: int) -> int:
    """`own_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", mode, "--side", str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    found = [n.split(":", 1)[1].strip() for n in names if n.startswith("model name")]
    return found[0] if found else platform.processor()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or "unknown"


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median_s": statistics.median(values),
        "min_s": min(values),
        "max_s": max(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=("forward", "train"))
    options = parser.parse_args()
    if options.peak:
        print(own_peak(options.peak, options.side))
        return
    import numba

    errors = check("auto")
    seconds = measure(options.side, options.rounds)

    def ratio(a: str, b: str) -> float:
        pairs = zip(seconds[a], seconds[b], strict=True)
        return statistics.median(x / y for x, y in pairs)

    result = {
        "what": "three-directional layer beside four 3x3x3 convolutions, CPU",
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
        },
        "commit": commit(),
        "shapes": {
            "tokens": [1, options.side**3, CHANNELS],
            "d_inner": INNER,
            "d_state": STATES,
            "dt_rank": RANK,
        },
        "dtype": "float32",
        "relative_error_at_8_cubed": errors,
        "rounds": options.rounds,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio_medians": {
            "forward_to_conv_x4_ncdhw": ratio("forward", "conv_x4_ncdhw"),
            "forward_to_conv_x4_channels_last": ratio(
                "forward", "conv_x4_channels_last"
            ),
            "backward_to_forward_for_training": ratio(
                "backward", "forward_for_training"
            ),
            "backward_to_forward": ratio("backward", "forward"),
        },
        "peak_memory_mib": {
            mode: peak(mode, options.side) for mode in ("forward", "train")
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
