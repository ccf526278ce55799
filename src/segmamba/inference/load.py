"""A trained run from its folder, ready to predict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from segmamba.atomic import read_json
from segmamba.checkpoint import ModelFile, load_model_file, load_model_metadata
from segmamba.config import load_yaml
from segmamba.data.dataset import Dataset, dataset_from_dict
from segmamba.data.plan import load_plan
from segmamba.devices import precision_for, resolve_device
from segmamba.errors import CheckpointError, describe
from segmamba.inference.networks import build_networks
from segmamba.inference.postprocessing import (
    POSTPROCESSING_FILE,
    PostprocessingStep,
    load_postprocessing,
)
from segmamba.inference.predictor import Predictor
from segmamba.types import JsonDict

MODEL_FILE = "model.safetensors"
"""What a fold's folder holds for prediction."""

SNAPSHOTS = "snapshots"
"""Folder in a fold's folder of the weights that were kept while it trained."""

_log = logging.getLogger(__name__)


def load_model(
    run: str | Path,
    device: str | torch.device = "auto",
    folds: Sequence[int | str] | int | str | None = None,
    *,
    overlap: float = 0.5,
    mirror: bool | Sequence[int] = True,
    precision: str = "auto",
    batch_size: int = 1,
    accumulate_dtype: torch.dtype = torch.float32,
    postprocessing: bool = True,
    whole_volume: bool = False,
    snapshots: bool = False,
) -> Predictor:
    """Load a trained run: plan, data set's channels and labels, weights of its folds.

    Only JSON, YAML and safetensors files are read, nothing is unpickled.

    Args:
        run: The folder that training wrote, or one fold's folder in it.
        device: "auto", "cpu", "cuda", "mps" or a device.
        folds: Which to average, such as 0, (0, 1) or "all" (the model trained on every
            case). None takes all numbered folds whose training is over; if none is,
            "all". A half-trained fold is used only where it is named or alone, with
            a warning in the log.
        overlap: Share of a window's side that neighbours have in common.
        mirror: Average over mirrorings, along the axes in which training mirrored; or
            the axes of (D, H, W).
        precision: "auto", "fp32", "bf16" or "fp16".
        batch_size: Windows in a forward pass.
        accumulate_dtype: Type of the summed logits: float32, or float16 to save memory.
        postprocessing: Do to label maps what the run's postprocessing.json says, if
            there is one.
        whole_volume: Show the networks whole scans, not windows.
        snapshots: Take the weights that were kept while the folds trained as more
            samples of uncertainty.

    Returns:
        A predictor: call it with a path or an array.

    Raises:
        CheckpointError: It isn't a run, nothing is trained, a fold is missing,
            several folds are half-trained and none is named, no snapshots were kept,
            or weights don't fit the plan.
        ConfigError: An option is out of range, or postprocessing.json can't be used.
        BackendUnavailableError: The device isn't there.
    """
    chosen = resolve_device(device)
    copy = chosen.type == "cpu"  # elsewhere the device gets a copy
    folder, folds = _resolve_run(Path(run), folds)
    plan = load_plan(folder / "plan.json")
    source = folder / "dataset.json"
    dataset = dataset_from_dict(read_json(source), source=source)
    models = _load_folds(folder, folds, copy=copy)
    kept = _load_snapshots(list(models), copy=copy) if snapshots else {}
    fast = chosen.type == "cpu" and precision_for(chosen, precision) == "bf16"
    return Predictor(
        build_networks(models, plan, dataset, channels_last=fast),
        plan,
        dataset.channels,
        dataset.labels,
        device=chosen,
        overlap=overlap,
        mirror=_mirror_axes(mirror, list(models)),
        precision=precision,
        batch_size=batch_size,
        accumulate_dtype=accumulate_dtype,
        postprocessing=_steps(folder, dataset) if postprocessing else (),
        whole_volume=whole_volume,
        snapshots=build_networks(kept, plan, dataset, channels_last=fast),
        identity={**_identity(models), "files": _files(folder, [*models, *kept])},
    )


@dataclass(frozen=True)
class TrainedFold:
    """A fold of a run that has weights."""

    name: str
    """Its number, or "all"."""
    path: Path
    """Its model file."""


def trained_folds(run: str | Path) -> list[TrainedFold]:
    """List the folds of a run that have weights.

    Args:
        run: The folder that training wrote.

    Returns:
        Numbered folds in ascending order, then "all".
    """
    found = [
        TrainedFold(path.parent.name.removeprefix("fold_"), path)
        for path in Path(run).glob(f"fold_*/{MODEL_FILE}")
    ]
    return sorted(found, key=lambda fold: (not fold.name.isdigit(), _order(fold.name)))


def _order(name: str) -> tuple[int, str]:
    return (int(name) if name.isdigit() else 0, name)


def _resolve_run(
    run: Path, folds: Sequence[int | str] | int | str | None
) -> tuple[Path, list[str] | None]:
    if run.name == MODEL_FILE and run.is_file():
        run = run.parent
    if run.name.startswith("fold_") and (run.parent / "plan.json").is_file():
        if folds is None:
            folds = run.name.removeprefix("fold_")
        run = run.parent
    for name in ("plan.json", "dataset.json"):
        if not (run / name).is_file():
            raise CheckpointError(
                describe(
                    "not a trained run",
                    expected="a folder that 'segmamba train' wrote",
                    found=f"no {name}" if run.is_dir() else "no such folder",
                    file=run,
                )
            )
    if folds is None:
        return run, None
    group = [folds] if isinstance(folds, (int, str)) else list(folds)
    return run, [str(fold).removeprefix("fold_") for fold in group]


def _load_folds(
    run: Path, folds: list[str] | None, *, copy: bool
) -> dict[Path, ModelFile]:
    there = {fold.name: fold.path for fold in trained_folds(run)}
    if not there:
        raise CheckpointError(
            describe(
                "nothing is trained yet",
                expected=f"fold_0/{MODEL_FILE} or another fold's",
                file=run,
                remedy=f"Run: segmamba train DATA -o {run}",
            )
        )
    paths = _default(there, run) if folds is None else _named(there, folds, run)
    models = {path: load_model_file(path, copy=copy) for path in paths}
    for path, model in models.items():
        if not _is_finished(model.metadata):
            _log.warning(
                "%s is half-trained (step %s): its training goes on or was "
                "interrupted. Its weights are used as they are.",
                path.parent.name,
                model.metadata.get("step", "unknown"),
            )
    return models


def _default(there: dict[str, Path], run: Path) -> list[Path]:
    """Choose the numbered folds whose training is over, or what comes nearest."""
    done = {
        name: _is_finished(load_model_metadata(path)) for name, path in there.items()
    }
    numbered = [name for name in there if name.isdigit()]
    chosen = [name for name in numbered if done[name]]
    chosen = chosen or [name for name in there if done[name]]
    left = [f"fold_{name}" for name in numbered if not done[name]]
    if chosen and left:
        _log.warning("left out, as their training is not over: %s", ", ".join(left))
    if not chosen and len(there) > 1:
        raise CheckpointError(
            describe(
                "no fold's training is over",
                expected="a finished fold, or the choice of half-trained ones",
                found=f"{', '.join(there)} in training or interrupted",
                file=run,
                remedy="Finish one with 'segmamba train --resume', or name one with "
                "--folds.",
            )
        )
    return [there[name] for name in chosen or there]


def _is_finished(metadata: JsonDict) -> bool:
    return bool(metadata.get("finished", True))  # files from elsewhere don't say


def _named(there: dict[str, Path], folds: list[str], run: Path) -> list[Path]:
    missing = [fold for fold in folds if fold not in there]
    if missing or not folds:
        raise CheckpointError(
            describe(
                f"fold {', '.join(missing) or '(none)'} is not trained",
                expected="one or more of " + ", ".join(there),
                file=run,
                remedy="Train it with --fold, or name another.",
            )
        )
    return [there[fold] for fold in dict.fromkeys(folds)]


def _steps(run: Path, dataset: Dataset) -> tuple[PostprocessingStep, ...]:
    path = run / POSTPROCESSING_FILE
    return load_postprocessing(path, dataset.labels).steps if path.exists() else ()


def _mirror_axes(
    mirror: bool | Sequence[int], paths: list[Path]
) -> bool | Sequence[int]:
    """Mirror no axis that the training did not: the network never saw it so."""
    if mirror is not True:
        return mirror
    axes = {0, 1, 2}
    for path in paths:
        config = path.with_name("config.yaml")
        data = load_yaml(config) if config.is_file() else {}
        augmentation = data.get("augmentation") or {}
        if not augmentation.get("enabled", True):
            return False
        axes &= set(augmentation.get("mirror_axes", axes))
    return tuple(sorted(axes))


def _identity(models: dict[Path, ModelFile]) -> JsonDict:
    """What tells these weights from others: fold, steps, end and checksum."""
    return {
        "folds": [path.parent.name.removeprefix("fold_") for path in models],
        "steps": [model.metadata.get("step") for model in models.values()],
        "finished": [_is_finished(model.metadata) for model in models.values()],
        "weights": [_fingerprint(model) for model in models.values()],
    }


def _load_snapshots(folds: list[Path], *, copy: bool) -> dict[Path, ModelFile]:
    """Read the weights that were kept while folds trained."""
    paths = [
        path
        for fold in folds
        for path in sorted((fold.parent / SNAPSHOTS).glob(f"*/{MODEL_FILE}"))
    ]
    if not paths:
        raise CheckpointError(
            describe(
                "no snapshots were kept while this model trained",
                expected=f"{SNAPSHOTS}/1/{MODEL_FILE} and more",
                file=folds[0].parent,
                remedy="Leave out --snapshots, or train with the setting "
                "train.snapshots.",
            )
        )
    return {path: load_model_file(path, copy=copy) for path in paths}


def _files(run: Path, models: list[Path]) -> list[str]:
    """Name every file that decides what the model predicts."""
    names = ("plan.json", "dataset.json", POSTPROCESSING_FILE)
    files = [*models, *(run / name for name in names if (run / name).is_file())]
    return [str(path) for path in files]


def _fingerprint(model: ModelFile) -> str:
    """Sum up all weights; enough to tell two trainings apart."""
    total = 0
    for name in sorted(model.tensors):
        raw = model.tensors[name].contiguous().reshape(-1).view(torch.uint8)
        total = crc32(raw.numpy().data, total)
    return f"{total:08x}"
