"""What is installed and usable here, and what a run is."""

from __future__ import annotations

import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

from segmamba import atomic
from segmamba.checkpoint import load_model_metadata
from segmamba.config import to_dict
from segmamba.data.dataset import dataset_from_dict
from segmamba.data.plan import Plan
from segmamba.devices import available_devices, precision_for, resolve_device
from segmamba.errors import ConfigError, describe
from segmamba.inference.load import trained_folds
from segmamba.manifest import NAME, package_version
from segmamba.ops.backends import automatic_backend, available_backends
from segmamba.types import JsonDict
from segmamba.workflow.folder import RunFolder
from segmamba.workflow.steps import load_run_plan
from segmamba.workflow.training_record import SETTINGS

Rows = list[tuple[str, str]]

PACKAGES = ("segmamba", "torch", "numpy", "scipy", "numba", "nibabel")


def info(run: Path | str | None = None) -> dict[str, Rows]:
    """Say what is installed and usable here; or what a run is.

    Args:
        run: A run folder, or None.

    Returns:
        Tables by title, each a list of (what, value).

    Raises:
        ConfigError: There is no run in that folder.
    """
    return _installation() if run is None else _run(RunFolder(Path(run)))


def _installation() -> dict[str, Rows]:
    device = resolve_device("auto")
    system: Rows = [("Python", platform.python_version())]
    system += [(name, package_version(name) or "not installed") for name in PACKAGES]
    system.append(("system", platform.platform()))
    devices = list(available_devices().items())
    devices.append(("auto takes", f"{device}, {precision_for(device)}"))
    return {
        "Versions": system,
        "Devices": devices,
        "Back ends of the scan": list(available_backends().items()) + _taken(),
    }


def _taken() -> Rows:
    """What "auto" takes on the CPU, and on the GPU if there is one."""
    kinds = {"CPU": "cpu"} | ({"GPU": "cuda"} if torch.cuda.is_available() else {})
    rows: Rows = []
    for name, kind in kinds.items():
        taken, reason = automatic_backend(torch.device(kind))
        warning = f", slower than it could be: {reason}" if reason else ""
        rows.append((f"auto takes on the {name}", taken + warning))
    return rows


def _run(run: RunFolder) -> dict[str, Rows]:
    if not run.dataset.exists():
        raise ConfigError(
            describe(
                "this is no run",
                expected="a folder with dataset.json, as 'segmamba train' writes it",
                file=run.root,
            )
        )
    dataset = dataset_from_dict(atomic.read_json(run.dataset))
    data: Rows = [
        ("name", dataset.name),
        ("folder", str(dataset.root)),
        ("layout", dataset.layout),
        ("cases", str(len(dataset.cases))),
        ("channels", ", ".join(dataset.channels)),
        ("outputs", ", ".join(dataset.labels.evaluated)),
    ]
    tables = {"Data set": data, "Plan": describe_plan(load_run_plan(run))}
    tables["Folds"] = [
        (fold.name, _describe_fold(run, fold.name, fold.path))
        for fold in trained_folds(run.root)
    ] or [("none", "nothing is trained yet")]
    for fold in trained_folds(run.root):
        rows = _describe_training(run.fold(fold.name))
        if rows:
            tables[f"Training of fold {fold.name}"] = rows
    return tables


def commands_again(run: Path | str) -> dict[str, str]:
    """Say how to train each fold of a run again, into a folder of its own.

    Args:
        run: A run folder.

    Returns:
        Fold to a command line; folds without a manifest are left out.
    """
    folder = RunFolder(Path(run))
    found = {}
    for fold in trained_folds(folder.root):
        path = folder.fold(fold.name)
        if (path / NAME).is_file() and (path / SETTINGS).is_file():
            manifest = atomic.read_json(path / NAME)
            found[fold.name] = _command_again(folder, fold.name, manifest)
    return found


def _command_again(run: RunFolder, fold: str, manifest: JsonDict) -> str:
    device = manifest["machine"]["device"].partition(":")[0]
    words = ["segmamba", "train", manifest["data"]["folder"], "-o", "run-again"]
    words += ["--config", str(run.fold(fold).absolute() / SETTINGS), "--fold", fold]
    if fold != "all":
        words += ["--splits", str(run.splits.absolute())]
    return shlex.join([*words, "--device", device])


def _describe_training(fold: Path) -> Rows:
    """Give what a fold's manifest says of how to make it again."""
    if not (fold / NAME).is_file():
        return []
    manifest = atomic.read_json(fold / NAME)
    data, split = manifest["data"], manifest["split"]
    calls = [call["command_line"] or "from Python" for call in manifest["sessions"]]
    machine = manifest["machine"]
    computer = f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads"
    versions = [f"{name} {text}" for name, text in manifest["versions"].items() if text]
    cases = f"{len(split['train'])} to train, {len(split['val'])} held out"
    return [
        ("called", "; ".join(calls)),
        ("state", f"{manifest['status']}, step {manifest['step']}"),
        ("seed", str(manifest["seed"])),
        ("data", f"{data['folder']}, {data['cases']} cases, SHA-256 {data['sha256']}"),
        ("data now", _describe_change(manifest["inputs"])),
        ("split", f"{split['hash']}: {cases}"),
        ("plan", manifest["plan"]["hash"]),
        ("versions", ", ".join(versions)),
        ("computer", computer),
        ("precision", f"{manifest['precision']}, scans by {machine['backend']}"),
        ("the same bits", _describe_repeatability(manifest)),
    ]


def _describe_change(inputs: list[JsonDict]) -> str:
    """Say which files are others than they were, by size and time."""
    changed = []
    for row in inputs:
        path = Path(row["path"])
        now = path.stat() if path.exists() else None
        if now is None or (now.st_size, now.st_mtime_ns) != (
            row["bytes"],
            row["modified"],
        ):
            changed.append(path.name)
    if not changed:
        return "as it was, by size and time of its files"
    return f"{len(changed)} files changed or gone: {', '.join(changed[:3])}"


def _describe_repeatability(manifest: JsonDict) -> str:
    if manifest["options"]["max_time_s"] is not None:
        return "no: the clock ended it; give --max-epochs for a run that repeats"
    return "yes, on such a computer with these versions and as many threads"


def describe_plan(plan: Plan) -> Rows:
    """Give a plan's decisions as rows of text.

    Args:
        plan: The plan.

    Returns:
        (what, value), the network's included.
    """
    rows: Rows = []
    for key, value in to_dict(plan).items():
        if key == "network":
            rows += [
                (f"network.{name}", _plain(item))
                for name, item in value.items()
                if item is not None
            ]
        elif key == "normalization":
            rows += [
                (f"channel {index}", _plain_normalization(item))
                for index, item in enumerate(value)
            ]
        else:
            rows.append((key, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value).replace('"', "")


def _plain_normalization(rule: dict[str, Any]) -> str:
    numbers = [f"{k} {_plain(v)}" for k, v in rule.items() if k != "scheme" and v]
    return " ".join([rule["scheme"], *numbers])


def _describe_fold(run: RunFolder, name: str, path: Path) -> str:
    metadata = load_model_metadata(path)
    text = f"step {metadata.get('step', '?')}"
    if not metadata.get("finished", True):
        text += ", half-trained: going on or interrupted"
    metrics = run.fold(name) / "metrics.json"
    if not metrics.exists():
        return text
    summary = atomic.read_json(metrics)["summary"]
    scores = [f"{label} {row['dice']['mean']:.3f}" for label, row in summary.items()]
    return f"{text}; Dice " + ", ".join(scores)
