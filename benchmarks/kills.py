"""Kill trainings (preprocessing included) and predictions with signal 9, and record it.

    python benchmarks/kills.py --kills 20 -o benchmarks/results/kills.json

Each command is killed at random moments and gone on with, again and again; the ends
must be those of undisturbed runs, to the byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "workflow"))

from kills import Killer, digests, killer, moments

from conftest import SETTINGS, make_dataset
from segmamba.atomic import write_json
from segmamba.benchmark.environment import environment
from segmamba.checkpoint import load_model_file

TRAIN = ["train", "data", "--config", "settings.yaml", "--device", "cpu", "--resume"]
PREDICT = ["predict", "whole", "data", "--no-mirror", "--device", "cpu"]


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on kills: the weights, and all files that state no times."""
    found: dict[str, Any] = {
        name: digest
        for name, digest in digests(folder).items()
        if name.endswith((".nii.gz", ".npy", ".npz"))
    }
    model = folder / "fold_0" / "model.safetensors"
    if model.exists():
        tensors = load_model_file(model).tensors
        found |= {name: tensors[name].numpy().tobytes() for name in sorted(tensors)}
    return found


def disturb(kill: Killer, words: list[str], folder: Path, kills: int) -> dict[str, Any]:
    """Kill a command until the number is reached, anew each time that it ends."""
    whole = folder / ("whole" if words[0] == "train" else "predictions")
    begin = time.monotonic()
    kill.run([*words, "-o", str(whole)])
    length, expected = time.monotonic() - begin, results(whole)
    counts = {"kills": 0, "ends": 0, "different_ends": 0, "left_over": 0}
    for number, seconds in enumerate(moments(10 * kills, 0.7 * length)):
        last = counts["kills"] >= kills
        output = folder / f"{words[0]}-{counts['ends']}"
        if kill.run([*words, "-o", str(output)], None if last else seconds):
            counts["kills"] += 1
            continue
        counts["ends"] += 1
        counts["different_ends"] += results(output) != expected
        counts["left_over"] += len(
            [*output.rglob(".writing-*"), *output.rglob("*.lock")]
        )
        print(words[0], number, counts, flush=True)
        if last:
            break
    return {"undisturbed_s": round(length, 1), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, default=Path("kills.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {
        "command": "python benchmarks/kills.py " + " ".join(sys.argv[1:]),
        "environment": environment(torch.device("cpu")),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder / "data")
        (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
        with killer(folder) as kill:
            for words in (TRAIN, PREDICT):
                record[words[0]] = disturb(kill, words, folder, options.kills)
    write_json(options.output, record)


if __name__ == "__main__":
    main()
