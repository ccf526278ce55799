"""Time the published network on the CPU with its scans, and with them left out.

    python benchmarks/cpu_network.py --out benchmarks/results/cpu_network.json

One forward pass of preset `segmamba` on 1 x 4 x 128^3, float32, without gradient, and
in turn the same with

- "no_scan": the causal convolution, the scan and the gate of each layer left out, its
  projections kept;
- "no_layer": the whole three-directional layer left out, projections too.

`tests/nn` checks the network against the published one's results; before it times, this
script checks one layer of the back end against the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cpu_scan
import torch
from torch import Tensor

import segmamba
from segmamba.nn import mamba


@contextmanager
def left_out(what: str) -> Iterator[None]:
    """Replace the scan, or its layer, by something that costs nothing."""
    scan, layer = mamba.tri_orientated_scan, mamba.TriOrientatedMamba.forward

    def half(xz: Tensor, *_: object, **__: object) -> Tensor:
        return xz[..., : xz.shape[-1] // 2]

    def nothing(_: object, tokens: Tensor, size: object) -> Tensor:
        return tokens

    if what == "no_scan":
        mamba.tri_orientated_scan = half
    elif what == "no_layer":
        mamba.TriOrientatedMamba.forward = nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        mamba.tri_orientated_scan = scan
        mamba.TriOrientatedMamba.forward = layer  # type: ignore[method-assign]


@torch.inference_mode()
def measure(side: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round of warming up."""
    network = segmamba.create_network("segmamba", in_channels=4, out_channels=4).eval()
    x = torch.randn(1, 4, side, side, side)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for what in ("whole", "no_scan", "no_layer"):
            with left_out(what):
                begin = time.perf_counter()
                network(x)
                taken = time.perf_counter() - begin
            if number:
                seconds.setdefault(what, []).append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    errors = cpu_scan.check("auto")
    seconds = measure(options.side, options.rounds)
    ratios = {
        f"whole_to_{what}": statistics.median(
            a / b for a, b in zip(seconds["whole"], seconds[what], strict=True)
        )
        for what in ("no_scan", "no_layer")
    }
    result = {
        "what": "preset segmamba, forward, with its scans and without, CPU",
        "device": cpu_scan.processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "commit": cpu_scan.commit(),
        "shape": [1, 4, *[options.side] * 3],
        "dtype": "float32",
        "relative_error_of_a_layer": errors,
        "rounds": options.rounds,
        "seconds": {k: cpu_scan.summary(v) for k, v in seconds.items()},
        "ratio_medians": ratios,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
