"""What whole volumes cost beside windows: seconds a scan, and memory.

    python benchmarks/whole_volume.py RUN SCANS -o benchmarks/results/whole_cost.json

Both are predicted by the command line, without mirroring, each in a process of its own,
one after the other; figures are those of their manifests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from segmamba.atomic import write_json
from segmamba.benchmark.environment import environment

WAYS = {"windows": [], "whole": ["--whole-volume"]}


def predict(run: Path, scans: Path, out: Path, more: list[str]) -> dict[str, Any]:
    """Predict all scans, and sum their manifest up."""
    words = ["predict", str(run), str(scans), "-o", str(out), "--no-mirror"]
    command = [sys.executable, "-m", "segmamba", *words, *more, "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((out / "manifest.json").read_text())
    cases = manifest["cases"].values()
    seconds = [case["seconds"] for case in cases]
    return {
        "cases": len(seconds),
        "failed": sum(case["status"] == "failed" for case in cases),
        "median_s": round(statistics.median(seconds), 3),
        "quartiles_s": [round(q, 3) for q in statistics.quantiles(seconds)[::2]],
        "peak_mib": manifest["peak_memory_mib"]["process"],
        "warnings": sum(len(case["warnings"]) for case in cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("scans", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("whole_cost.json"))
    options = parser.parse_args()
    plan = json.loads((options.run / "plan.json").read_text())
    record: dict[str, Any] = {
        "command": "python benchmarks/whole_volume.py RUN SCANS",
        "environment": environment(torch.device("cpu")),
        "patch_size": plan["patch_size"],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, more in WAYS.items():
            out = Path(folder) / name
            record[name] = predict(options.run, options.scans, out, more)
            print(name, record[name], flush=True)
    write_json(options.output, record)


if __name__ == "__main__":
    main()
