"""Peak memory of predicting a large CT with many classes on a CPU.

    python benchmarks/large_ct.py --out benchmarks/results/large_ct.json

The scan is made by code, the network is one convolution: what is measured is all that
lies around a network. Run it in a process of its own: the peak is the process's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from segmamba import manifest
from segmamba.benchmark.environment import environment
from segmamba.config import NetworkConfig
from segmamba.data.labels import LabelScheme
from segmamba.data.plan import ChannelNormalization, Plan
from segmamba.data.resample import SLAB_BYTES, resampled_shape
from segmamba.inference import Predictor, attempts, predict_cases
from segmamba.types import Size3, Spacing3

MIB = 2**20
MOST_MIB = 6 * 1024
"""What a whole CT may take: the process with all that it imports."""
CT_SPACING_MM = (0.8, 0.8, 1.0)


def write_scan(path: Path, size: tuple[int, int, int]) -> None:
    """Write smooth blobs on noise, in int16 as CTs are, slice by slice."""
    random = np.random.default_rng(0)
    voxels = np.empty(size, np.int16)
    x, y = np.meshgrid(*(np.linspace(-3, 3, n) for n in size[:2]), indexing="ij")
    for k in range(size[2]):
        plane = 400 * np.sin(x * (1 + k / size[2])) * np.cos(y) - 200
        voxels[..., k] = plane + random.integers(-20, 20, size[:2])
    affine = np.diag([-CT_SPACING_MM[0], -CT_SPACING_MM[1], CT_SPACING_MM[2], 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), path)


@dataclass(frozen=True)
class Job:
    """What is predicted, and how."""

    size: Size3
    classes: int
    spacing_mm: Spacing3
    patch: int
    overlap: float

    @property
    def inner(self) -> Size3:
        """Voxels along (D, H, W) of what the network sees."""
        deep, rows, columns = self.size[2], self.size[1], self.size[0]
        before = (CT_SPACING_MM[2], CT_SPACING_MM[1], CT_SPACING_MM[0])
        return resampled_shape((deep, rows, columns), before, self.spacing_mm)

    @property
    def whole_sums(self) -> int:
        """Bytes of the logits of the whole scan."""
        return 4 * self.classes * math.prod(self.inner)

    def bound_mib(self) -> dict[str, float]:
        """Bound what prediction takes beside the interpreter, part by part."""
        voxels, window = math.prod(self.size), self.patch**3
        piece = max(SLAB_BYTES, 4 * self.classes * self.size[0] * self.size[1])
        parts = {
            "scan": (2 + 4 + 4) * voxels,  # as stored, in float32, and normalised
            "image": 4 * math.prod(self.inner),
            "sums": min(attempts.SUMS_BYTES, self.whole_sums),
            "windows": 4 * window * (2 + 4 * self.classes),
            "pieces": 4 * piece,
            "label map": 3 * voxels,  # itself, as written, compressed
        }
        return {name: round(size / MIB, 1) for name, size in parts.items()}


def make_predictor(job: Job) -> Predictor:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, job.classes, 1)
    plan = Plan(
        orientation="SPL",
        spacing_mm=job.spacing_mm,
        patch_size=(job.patch,) * 3,
        batch_size=1,
        normalization=(ChannelNormalization("ct", (-500.0, 500.0), 0.0, 200.0),),
        network=NetworkConfig(),
        crop_to_nonzero=False,
    )
    organs = {f"organ{number}": number for number in range(1, job.classes)}
    scheme = LabelScheme({"background": 0, **organs})
    options: dict[str, Any] = {"device": "cpu", "mirror": False}
    return Predictor(network, plan, ["CT"], scheme, overlap=job.overlap, **options)


def measure(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "ct.nii.gz"
        write_scan(scan, job.size)
        before = manifest.peak_memory(None)["process"]
        begun = time.monotonic()
        summary = predict_cases(make_predictor(job), scan, Path(folder) / "out")
        seconds = time.monotonic() - begun
        assert summary.done == ("ct",), summary.failed
        label = np.asarray(nib.load(summary.outputs["ct"]).dataobj)  # pyright: ignore
    bound = job.bound_mib()
    return {
        "what": "peak resident memory of predicting a CT made by code on a CPU",
        "command": "python benchmarks/large_ct.py " + " ".join(sys.argv[1:]),
        "environment": environment(torch.device("cpu")),
        "spacing_mm": CT_SPACING_MM,
        "network_spacing_mm": job.spacing_mm,
        **{name: getattr(job, name) for name in ("size", "classes", "patch")},
        "overlap": job.overlap,
        "labels_found": len(np.unique(label[..., ::50])),
        "seconds": round(seconds, 1),
        "before_mib": before,
        "peak_mib": manifest.peak_memory(None)["process"],
        "bound_mib": bound,
        "peak_allowed_mib": min(MOST_MIB, round(before + sum(bound.values()), 1)),
        "whole_sums_mib": round(job.whole_sums / MIB, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 700))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--spacing", type=float, default=1.5)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--sums-mib", type=int, default=attempts.SUMS_BYTES // MIB)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    attempts.SUMS_BYTES = options.sums_mib * MIB
    i, j, k = options.size
    spacing = (options.spacing,) * 3
    job = Job((i, j, k), options.classes, spacing, options.patch, options.overlap)
    found = measure(job)
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if found["peak_mib"] <= found["peak_allowed_mib"] else 1


if __name__ == "__main__":
    sys.exit(main())
