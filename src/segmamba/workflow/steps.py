"""Check, plan and predict."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segmamba import atomic
from segmamba.config import PeerConfig, from_dict, network_class
from segmamba.data.check import CheckReport, check_dataset
from segmamba.data.dataset import Dataset, dataset_from_dict, dataset_to_dict
from segmamba.data.fingerprint import Fingerprint, make_fingerprint
from segmamba.data.layouts import load_dataset
from segmamba.data.plan import Plan, load_plan, make_plan, save_plan
from segmamba.devices import resolve_device
from segmamba.errors import ConfigError, FormatError, describe
from segmamba.inference.cases import PredictionSummary, find_cases, predict_cases
from segmamba.inference.dicom_study import SegOutput
from segmamba.inference.load import load_model
from segmamba.manifest import Session
from segmamba.nn import preset_config
from segmamba.nn.footprint import footprint
from segmamba.types import Size3
from segmamba.workflow.folder import (
    Progress,
    RunFolder,
    RunSettings,
    load_settings,
    staged,
)

_log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 5
"""Problems that an error text lists before it points to `segmamba check`."""


def check(
    data: Path | str | Dataset,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Find every problem of a data set.

    Args:
        data: A folder in a known layout, a CSV file, or a loaded data set.
        workers: Cases read at once; None takes the number of cores.
        progress: Called with the cases done, all cases, and what is being done.

    Returns:
        The report; `ok` says whether there is no error in it.

    Raises:
        FormatError: It isn't a data set at all.
    """
    return check_dataset(data, workers=workers, progress=staged(progress, "checking"))


def plan(
    data: Path | str,
    run: Path | str,
    *,
    preset: str | None = None,
    device: str = "auto",
    memory_mib: float | None = None,
    config: Path | str | RunSettings | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Check and measure a data set and decide from it how to train.

    Writes `dataset.json`, `fingerprint.json` and `plan.json` into the run. A
    fingerprint that is there for the same cases is kept; the plan is made anew.

    Args:
        data: A folder in a known layout, or a CSV file.
        run: The run folder; made if it is missing.
        preset: The network; None takes `default_preset`.
        device: What to plan for: "auto", "cpu", "cuda" ...
        memory_mib: Its memory; None asks the device.
        config: YAML file, or settings, whose sections network and plan replace
            decisions.
        progress: Called with the steps done, all steps, and what is being done.

    Returns:
        The plan.

    Raises:
        FormatError: The data set has errors.
        ConfigError: A setting is unknown or unusable.
        BackendUnavailableError: The device isn't there, or the package that has the
            network isn't installed.
    """
    settings = load_settings(config)
    target = resolve_device(device)
    named = preset or settings.preset
    name = named or default_preset(target)
    network = preset_config(name, **network_overrides(settings, name))
    if isinstance(network, PeerConfig):  # a missing package shows before long work
        footprint(network)
    dataset, fingerprint = measure(data, RunFolder(Path(run)), progress)
    if not named:
        name = default_preset(target, fingerprint.median_shape)
        network = preset_config(name, **network_overrides(settings, name))
    decided = make_plan(
        fingerprint,
        dataset,
        network=network,
        device=str(target),
        memory_mib=memory_mib,
        overrides=plan_overrides(settings, name),
    )
    save_plan(RunFolder(Path(run)).plan, decided)
    atomic.remove_leftovers(Path(run), atomic.LEFTOVER_AGE_S)
    return decided


SMALL_VOXELS = 64**3
"""Voxels of a case, the median one, up to which it counts as small."""


def default_preset(device: torch.device, shape: Size3 | None = None) -> str:
    """Name the network that suits a device and data.

    Args:
        device: Where it will be trained.
        shape: Voxels of the median case along its axes; None if they aren't known.

    Returns:
        segmamba-light for a CPU; for a GPU segmamba-small where cases are small, else
        segmamba.
    """
    if device.type == "cpu":
        return "segmamba-light"
    small = shape is not None and math.prod(shape) <= SMALL_VOXELS
    return "segmamba-small" if small else "segmamba"


def measure(
    data: Path | str, run: RunFolder, progress: Progress | None
) -> tuple[Dataset, Fingerprint]:
    """Load a data set and its fingerprint; check and measure it if that is missing.

    Args:
        data: A folder in a known layout, or a CSV file.
        run: Where `dataset.json` and `fingerprint.json` are kept.
        progress: Called with the steps done, all steps, and what is being done.

    Returns:
        The data set and its fingerprint.

    Raises:
        FormatError: The data set has errors.
    """
    dataset = load_dataset(data)
    fingerprint = _kept_fingerprint(dataset, run)
    if fingerprint is not None:
        return dataset, fingerprint
    run.root.mkdir(parents=True, exist_ok=True)  # fails before long work, not after
    _require_sound(check(dataset, progress=progress), data)
    fingerprint = make_fingerprint(dataset, progress=staged(progress, "measuring"))
    atomic.write_json(run.dataset, dataset_to_dict(dataset))
    atomic.write_json(run.fingerprint, fingerprint.to_dict())
    return dataset, fingerprint


def _kept_fingerprint(dataset: Dataset, run: RunFolder) -> Fingerprint | None:
    """Give what was measured on the same cases; None if it must be measured again."""
    if not run.fingerprint.exists() or not _same_dataset(dataset, run):
        return None
    try:
        data = atomic.read_json(run.fingerprint)
    except FormatError as error:
        _log.warning("the data are measured again: %s", error)
        return None
    return from_dict(Fingerprint, data, source=str(run.fingerprint))


def _same_dataset(dataset: Dataset, run: RunFolder) -> bool:
    if not run.dataset.exists():
        return False
    given = dataset_from_dict(dataset_to_dict(dataset))  # its paths may be relative
    try:
        return dataset_from_dict(atomic.read_json(run.dataset)) == given
    except FormatError as error:
        _log.warning("the data are measured again: %s", error)
        return False


def _require_sound(report: CheckReport, data: Path | str) -> None:
    if report.ok:
        return
    errors = report.errors
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    shown = errors[:SHOWN_PROBLEMS]
    lines = [f"  {item.file or item.case}: {item.message}" for item in shown]
    raise FormatError(
        f"the data set {data} has {count}:\n"
        + "\n".join(lines)
        + f"\nRun 'segmamba check {data}' to see all of them, and mend or remove them."
    )


def network_overrides(settings: RunSettings, preset: str) -> dict[str, Any]:
    """Give what the section network says, checked.

    Args:
        settings: The settings.
        preset: The network that they are of.

    Returns:
        Fields of its configuration.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type, or there is a name.
    """
    if "name" in settings.network:
        raise ConfigError(
            describe(
                "the network is not named in its own section",
                expected="a line preset beside the section network",
                found=f"name: {settings.network['name']}",
            )
        )
    checked = from_dict(
        network_class(preset), settings.network, source="the section network"
    )
    return {key: getattr(checked, key) for key in settings.network}


def plan_overrides(settings: RunSettings, preset: str) -> dict[str, Any]:
    """Give what the settings decide of a plan: its section, and the network's strides.

    Args:
        settings: The settings.
        preset: The network that they are of.

    Returns:
        What `make_plan` takes. It fits all else of a network to the data.

    Raises:
        ConfigError: As `network_overrides`; or the section plan holds a network.
    """
    if "network" in settings.plan:
        raise ConfigError(
            describe(
                "the network is set in its own section",
                expected="a section network beside the section plan",
            )
        )
    strides = network_overrides(settings, preset).get("strides")
    network = {"network": {"strides": strides}} if strides else {}
    return {**settings.plan, **network}


def load_run_plan(run: RunFolder) -> Plan:
    """Read a run's plan.

    Raises:
        ConfigError: It is missing, or was edited to something unusable.
    """
    if not run.plan.exists():
        raise ConfigError(
            describe(
                "the run has no plan",
                expected="plan.json",
                file=run.root,
                remedy="Run 'segmamba plan' or 'segmamba train' first.",
            )
        )
    return load_plan(run.plan)


def predict(
    run: Path | str,
    scans: Path | str | Sequence[Path | str],
    output: Path | str,
    *,
    device: str = "auto",
    mirror: bool = True,
    overlap: float = 0.5,
    precision: str = "auto",
    probabilities: bool = False,
    uncertainty: bool = False,
    snapshots: bool = False,
    whole_volume: bool = False,
    folds: Sequence[str] | None = None,
    overwrite: bool = False,
    postprocessing: bool = True,
    series: Sequence[str] | None = None,
    frames: bool = False,
    dicom: Sequence[SegOutput] = (),
    progress: Progress | None = None,
) -> PredictionSummary:
    """Segment scans with a trained run and write label maps.

    Args:
        run: A run folder.
        scans: A scan, the channels of one in their order, a folder, a data set, or a
            folder or archive of DICOM series.
        output: A folder; or a file name with a scan's ending, for a single scan.
        device: "auto", "cpu", "cuda" ...
        mirror: Average over mirrorings.
        overlap: Of neighbouring windows, 0 to below 1.
        precision: "auto" (bf16 where the device has units for it), "bf16", "fp16" or
            "fp32".
        probabilities: Write these too.
        uncertainty: Write maps of entropy, mutual information and confidence too, and
            volumes with their spread into the manifest.
        snapshots: Take the weights kept while training as more samples of it.
        whole_volume: Show the network whole scans, not windows.
        folds: Which to average; None takes all that are trained.
        overwrite: Predict finished cases again.
        postprocessing: Do what the run's postprocessing.json says, if there is one.
        series: Of DICOM: number, description or UID of each channel's series.
        frames: Segment each frame of 4D scans by itself.
        dicom: Write DICOM-SEG or RTSTRUCT too, for scans that are DICOM.
        progress: Called with the windows done, all windows, and the case.

    Returns:
        Which cases are done, were there already, or failed and why.

    Raises:
        CheckpointError: It isn't a trained run.
        FormatError: There is no scan.
    """
    with Session("predict") as session:
        predictor = load_model(
            run,
            device,
            folds,
            overlap=overlap,
            mirror=mirror,
            precision=precision,
            postprocessing=postprocessing,
            whole_volume=whole_volume,
            snapshots=snapshots,
        )
        cases = find_cases(scans, predictor.channels, series=series, frames=frames)
        return predict_cases(
            predictor,
            cases,
            Path(output),
            overwrite=overwrite,
            probabilities=probabilities,
            uncertainty=uncertainty,
            dicom=dicom,
            session=session,
            progress=staged(progress, "predicting"),
        )
