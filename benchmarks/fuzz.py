"""Fuzz every reader for long, and record what came of it.

    python benchmarks/fuzz.py --inputs 110000 -o benchmarks/results/fuzz.json

With `--guided SECONDS`, and atheris installed, each reader is fuzzed for so long again,
led by the coverage of segmamba, nibabel, pydicom and yaml.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "io"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from engine import LONGEST_S, MOST_MEMORY, Outcome, fuzz
from target import LARGEST
from targets import NAMES, make_targets

from segmamba.atomic import write_json
from segmamba.benchmark.environment import environment, package_version


@dataclass
class Options:
    inputs: int
    seed: int
    guided: float
    output: Path
    broken: Path
    names: list[str]


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=110_000, help="of all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=float, default=0, help="seconds a reader")
    parser.add_argument("--broken", type=Path, default=Path("broken-inputs"))
    parser.add_argument("-o", "--output", type=Path, default=Path("fuzz.json"))
    parser.add_argument("names", nargs="*", default=list(NAMES))
    return Options(**vars(parser.parse_args()))


def blind(options: Options, folder: Path) -> dict[str, Any]:
    """Damage valid inputs at random, the same share for each reader."""
    each = -(-options.inputs // len(options.names))
    targets, rows = make_targets(folder / "seeds"), {}
    for name in options.names:
        begin, before = time.monotonic(), peak_mib()
        outcome = fuzz(targets[name], folder / name, inputs=each, seed=options.seed)
        keep(outcome, name, options.broken)
        rows[name] = {
            "inputs": outcome.inputs,
            "accepted": outcome.accepted,
            "refused": dict(outcome.refused.most_common()),
            "failures": len(outcome.failures),
            "slowest_s": round(outcome.slowest_s, 3),
            "seconds": round(time.monotonic() - begin, 1),
            "memory_growth_mib": round(peak_mib() - before, 1),
        }
        print(name, rows[name], flush=True)
    return rows


def keep(outcome: Outcome, name: str, folder: Path) -> None:
    """Write inputs that broke a promise to files, and say which promise."""
    different = dict(zip(outcome.failures, outcome.broken, strict=True))
    for index, (failure, data) in enumerate(different.items()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{index}").write_bytes(data)
        print(f"  {folder}/{name}-{index}: {failure!a}", flush=True)


def guided(options: Options, folder: Path) -> dict[str, Any]:
    """Let atheris lead, a process for each reader."""
    rows = {}
    for name in options.names:
        corpus = folder / f"guided-{name}"
        script = [sys.executable, str(Path(__file__).with_name("fuzz_guided.py"))]
        command = [*script, name, str(corpus), str(options.broken)]
        command.append(str(round(options.guided)))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows[name] = summary(done.stderr)
        rows[name]["failures"] = len(list(options.broken.glob(f"guided-{name}-*")))
        if done.returncode != 0:
            rows[name]["failures"] += 1
            print(done.stderr[-2000:])
        print(name, rows[name], flush=True)
    return rows


def summary(log: str) -> dict[str, Any]:
    """Take inputs, edges and slowest input from libFuzzer's log."""
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
    edges = re.findall(r" cov: (\d+) ", log)
    return {
        "inputs": int(stats.get("number_of_executed_units", 0)),
        "edges_first": int(edges[0]) if edges else 0,
        "edges_last": int(edges[-1]) if edges else 0,
        "slowest_s": int(stats.get("slowest_unit_time_sec", 0)),
        "peak_rss_mib": int(stats.get("peak_rss_mb", 0)),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    options = parse()
    record: dict[str, Any] = {
        "command": "python benchmarks/fuzz.py " + " ".join(sys.argv[1:]),
        "environment": environment(torch.device("cpu")),
        "bounds": {
            "largest_input_bytes": LARGEST,
            "seconds": LONGEST_S,
            "address_space_mib": MOST_MEMORY >> 20,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seeds").mkdir()
        record["blind"] = blind(options, Path(folder))
        if options.guided:
            record["led_by"] = f"atheris {package_version('atheris')}"
            record["guided"] = guided(options, Path(folder))
    rows = [*record["blind"].values(), *record.get("guided", {}).values()]
    record["inputs"] = sum(row["inputs"] for row in rows)
    record["failures"] = sum(row["failures"] for row in rows)
    write_json(options.output, record)
    print(f"{record['inputs']} inputs, {record['failures']} failures")
    sys.exit(record["failures"] > 0)


if __name__ == "__main__":
    main()
