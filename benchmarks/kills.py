"""Kill trainings (preprocessing included) and predictions with signal 9, and record it.

    python benchmarks/kills.py --kills 20 -o benchmarks/results/kills.json

Each command is killed at random moments and gone on with, again and again; the ends
must be those of undisturbed runs, to the byte.
"""

from __future__ import annotations

import argparse
import random
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
from segmamba.atomic import PREFIX, write_json
from segmamba.benchmark.environment import environment
from segmamba.checkpoint import load_checkpoint, load_model_file

OPTIONS = ["--config", "settings.yaml", "--device", "cpu", "--resume"]
JOBS = {
    "preprocessing": ["train", "many", *OPTIONS],
    "training": ["train", "few", *OPTIONS],
    "prediction": ["predict", "whole-training", "many", "--no-mirror"],
}
SAVE_EVERY_S = 0.05
"""Between states of a training: most kills must find one to go on from."""


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on kills: the weights, and all files that state no times."""
    found: dict[str, Any] = {
        name: digest
        for name, digest in digests(folder).items()
        if name.endswith((".nii.gz", ".npy", ".npz")) and PREFIX not in name
    }
    model = folder / "fold_0" / "model.safetensors"
    if model.exists():
        tensors = load_model_file(model).tensors
        found |= {name: tensors[name].numpy().tobytes() for name in sorted(tensors)}
    return found


def progress(job: str, folder: Path) -> int:
    """Tell how far a job came: cases preprocessed or predicted, or steps trained."""
    if job == "preprocessing":
        return len(list(folder.glob("cache/case_*.json")))
    if job == "prediction":
        return len(list(folder.glob("case_*.nii.gz")))
    states = sorted(folder.glob("fold_0/checkpoint*.safetensors"))
    return max(
        (load_checkpoint(path)[1]["state"]["step"] for path in states), default=0
    )


def disturb(kill: Killer, job: str, folder: Path, kills: int) -> dict[str, Any]:
    """Kill a command until the number is reached, anew each time that it ends."""
    words, whole = JOBS[job], folder / f"whole-{job}"
    begin, source = time.monotonic(), random.Random(0)
    kill.run([*words, "-o", str(whole)])
    longest, expected = 0.9 * (time.monotonic() - begin), results(whole)
    counts = {"kills": 0, "ends": 0, "different_ends": 0, "left_over": 0}
    most, reached = progress(job, whole), []
    for seconds in moments(10 * kills, longest):
        last = counts["kills"] >= kills
        output = folder / f"{job}-{counts['ends']}"
        after, pause = ("", 0), None if last else seconds
        if job == "preprocessing":  # a part of the command: kill at a random case
            cases = progress(job, output) + source.randrange(8)
            after = (f"{output.name}/cache/case_*.json", cases)
            pause = None if last or cases >= most else seconds / 2000
        command = [*words, "-o", str(output)]
        was_killed = kill.run(command, pause, after)
        is_over = job == "preprocessing" and progress(job, output) == most
        if was_killed and not is_over:
            counts["kills"] += 1
            reached.append(progress(job, output))
            continue
        if was_killed:  # too late to disturb the job: let the rest of it end
            kill.run(command)
        counts["ends"] += 1
        counts["different_ends"] += results(output) != expected
        left = [*output.rglob(f"{PREFIX}*"), *output.rglob("*.lock")]
        left = [path for path in left if path.parent.name != "cache"]  # by their age
        counts["left_over"] += len(left)
        print(job, counts, reached, flush=True)
        if last:
            break
    return {"longest_s": round(longest, 2), **counts, "whole": most, "reached": reached}


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
        make_dataset(folder / "few")
        make_dataset(folder / "many", cases=30)
        train = {**SETTINGS["train"], "augmentation": {"enabled": False}}
        train |= {"save_every_s": SAVE_EVERY_S, "max_epochs": 5}
        text = yaml.safe_dump({**SETTINGS, "train": train})
        (folder / "settings.yaml").write_text(text)
        with killer(folder) as kill:
            for job in JOBS:
                record[job] = disturb(kill, job, folder, options.kills)
    write_json(options.output, record)


if __name__ == "__main__":
    main()
