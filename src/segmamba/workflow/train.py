"""Train one fold: everything from a folder of scans to scores on held-out cases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from segmamba.config import TrainConfig, from_dict, to_dict, training_defaults
from segmamba.data.dataset import Dataset
from segmamba.data.networks import fit_network
from segmamba.data.plan import Plan
from segmamba.data.splits import (
    Split,
    load_splits,
    make_splits,
    paper_split,
    save_splits,
)
from segmamba.devices import resolve_device
from segmamba.errors import ConfigError, describe
from segmamba.nn import preset_config
from segmamba.workflow.fold import FoldTraining, TrainingOutcome
from segmamba.workflow.folder import (
    Progress,
    RunFolder,
    RunSettings,
    load_settings,
)
from segmamba.workflow.steps import (
    load_run_plan,
    measure,
    network_overrides,
    plan,
    plan_overrides,
)

SplitScheme = Literal["5-fold", "70-10-20"]

_log = logging.getLogger(__name__)


def train(
    data: Path | str,
    run: Path | str,
    *,
    preset: str | None = None,
    fold: int | str = 0,
    max_time_s: float | None = None,
    max_epochs: int | None = None,
    device: str = "auto",
    resume: bool = False,
    config: Path | str | RunSettings | None = None,
    splits_file: Path | str | None = None,
    split: SplitScheme = "5-fold",
    seed: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainingOutcome:
    """Train one fold of a data set, doing whatever comes before it and is missing.

    Args:
        data: A folder in a known layout, or a CSV file.
        run: The run folder; made if it is missing.
        preset: The network; None takes the plan's, or the device's default.
        fold: Number of the split, or "all" to train on every case.
        max_time_s: Seconds to train; the schedule follows the clock.
        max_epochs: Epochs to train; 1000 if neither is given.
        device: "auto", "cpu", "cuda" ...
        resume: Go on from the last saved state.
        config: YAML file of settings, or the settings.
        splits_file: Splits of one's own; None keeps the run's or draws them.
        split: Which splits to draw.
        seed: Of weights, patches and augmentation.
        progress: Called with steps done, all steps, what is being done, and a note.
        say: Called with a line of text at each stage.

    Returns:
        Folder, time and scores.

    Raises:
        FormatError: The data set has errors.
        ConfigError: A setting, the plan or the splits are unusable, or the run exists
            and `resume` is off.
        TrainingError: Not-a-number, or an interruption.
    """
    job = fold_training(
        data,
        run,
        preset=preset,
        fold=fold,
        max_time_s=max_time_s,
        max_epochs=max_epochs,
        device=device,
        config=config,
        splits_file=splits_file,
        split=split,
        seed=seed,
        progress=progress,
    )
    return job.train(resume, say or (lambda text: None))


def fold_training(
    data: Path | str,
    run: Path | str,
    *,
    preset: str | None = None,
    fold: int | str = 0,
    max_time_s: float | None = None,
    max_epochs: int | None = None,
    device: str = "auto",
    config: Path | str | RunSettings | None = None,
    splits_file: Path | str | None = None,
    split: SplitScheme = "5-fold",
    seed: int | None = None,
    progress: Progress | None = None,
) -> FoldTraining:
    """Do all that comes before a training: measure, plan, split and compose settings.

    Args:
        data: As for `train`, and so are the other arguments.
        run: The run folder.
        preset: The network.
        fold: Number of the split, or "all".
        max_time_s: Seconds to train.
        max_epochs: Epochs to train.
        device: Where to train.
        config: YAML file of settings, or the settings.
        splits_file: Splits of one's own.
        split: Which splits to draw.
        seed: Of weights, patches and augmentation.
        progress: Called with steps done, all steps, what is being done, and a note.

    Returns:
        The training, ready to begin or to go on.

    Raises:
        FormatError: The data set has errors.
        ConfigError: A setting, the plan or the splits are unusable.
    """
    settings, folder = load_settings(config), RunFolder(Path(run))
    fold, target = str(fold), resolve_device(device)
    folder.fold(fold)  # a bad name is refused before any work
    dataset, decided = _planned(
        data, folder, settings, preset, config, device, progress
    )
    members = _members(dataset, folder, fold, splits_file, split)
    training = train_config(
        decided, settings, seed=seed, max_epochs=max_epochs, max_time_s=max_time_s
    )
    return FoldTraining(
        dataset, decided, training, members, folder, fold, target, progress
    )


def train_config(
    plan: Plan,
    settings: RunSettings,
    *,
    seed: int | None = None,
    max_epochs: int | None = None,
    max_time_s: float | None = None,
) -> TrainConfig:
    """Compose the settings of a training: defaults, the preset's, the file's, options.

    Args:
        plan: The plan; its network's preset and its batch size count.
        settings: What the `--config` file holds.
        seed: Option; None leaves it as it is.
        max_epochs: Option.
        max_time_s: Option; it takes the place of a number of epochs.

    Returns:
        The settings.

    Raises:
        ConfigError: A setting is unknown or has the wrong type.
    """
    options = {"seed": seed, "max_epochs": max_epochs, "max_time_s": max_time_s}
    given = {key: value for key, value in options.items() if value is not None}
    if max_time_s is not None and max_epochs is None:
        given["max_epochs"] = None
    values = {**training_defaults(plan.network.name), **settings.train, **given}
    values.setdefault("batch_size", plan.batch_size)
    return from_dict(TrainConfig, values, source="the section train")


def _planned(
    data: Path | str,
    folder: RunFolder,
    settings: RunSettings,
    preset: str | None,
    config: Path | str | RunSettings | None,
    device: str,
    progress: Progress | None,
) -> tuple[Dataset, Plan]:
    """Load the run's plan, or make it if there is none."""
    dataset, _ = measure(data, folder, progress)
    if not folder.plan.exists():
        decided = plan(
            data,
            folder.root,
            preset=preset,
            device=device,
            config=config,
            progress=progress,
        )
        return dataset, decided
    decided = load_run_plan(folder)
    wanted = preset or settings.preset
    if wanted is not None and wanted != decided.network.name:
        raise ConfigError(
            describe(
                "the run is planned for another network",
                expected=decided.network.name,
                found=wanted,
                file=folder.plan,
                remedy="Choose another run folder, or plan anew with 'segmamba plan'.",
            )
        )
    _compare_with_planned(settings, decided, folder.plan)
    return dataset, decided


def _compare_with_planned(settings: RunSettings, decided: Plan, file: Path) -> None:
    """Check the sections network and plan, and tell what the run's plan overrules."""
    network, preset = decided.network, decided.network.name
    asked = network_overrides(settings, preset)
    given = plan_overrides(settings, preset)
    changed = {**to_dict(decided), **given, "network": to_dict(network)}
    wanted = from_dict(Plan, changed, source="the section plan")
    fitted = fit_network(
        preset_config(preset, **asked),
        asked.get("strides") or network.strides or (),
        decided.patch_size,
        network.in_channels,
        network.out_channels,
    )
    pairs = [
        (key, getattr(wanted, key), getattr(decided, key)) for key in settings.plan
    ]
    pairs += [
        (f"network.{key}", getattr(fitted, key), getattr(network, key)) for key in asked
    ]
    differing = [(name, new, old) for name, new, old in pairs if new != old]
    for name, new, old in differing:
        _log.warning(
            "%s counts, with %s %s; the settings' %s is left unused (another run "
            "folder, or 'segmamba plan', plans with it)",
            *(file, name, old, new),
        )


def _members(
    dataset: Dataset,
    folder: RunFolder,
    fold: str,
    splits_file: Path | str | None,
    split: SplitScheme,
) -> Split:
    """Say which cases train and which are held out."""
    ids = [case.id for case in dataset.cases]
    if fold == "all":
        return {"train": sorted(ids), "val": []}
    splits = _splits(ids, folder, splits_file, split)
    if int(fold) >= len(splits):
        raise ConfigError(
            describe(
                "no such fold",
                expected=f"0 to {len(splits) - 1}, or all",
                found=fold,
                file=folder.splits,
            )
        )
    members = splits[int(fold)]
    unknown = {*members["train"], *members["val"]} - set(ids)
    if unknown:
        raise ConfigError(
            describe(
                "the splits name cases that the data set lacks",
                found=", ".join(sorted(unknown)[:5]),
                file=splits_file or folder.splits,
            )
        )
    return members


def _splits(
    ids: list[str],
    folder: RunFolder,
    splits_file: Path | str | None,
    split: SplitScheme,
) -> list[Split]:
    if splits_file is not None:
        splits = load_splits(splits_file)
    elif split == "70-10-20":
        splits = [paper_split(ids)]
    elif folder.splits.exists():
        return load_splits(folder.splits)
    else:
        splits = make_splits(ids)
    if folder.splits.exists() and load_splits(folder.splits) != splits:
        raise ConfigError(
            describe(
                "the run has other splits already",
                file=folder.splits,
                remedy="Choose another run folder, delete this file, or leave out the "
                "option to keep them.",
            )
        )
    save_splits(folder.splits, splits)
    return splits
