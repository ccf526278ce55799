"""The whole job in one call: data, check, plan, training, prediction, scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segmamba import atomic, workflow
from segmamba.data.dataset import Case, Dataset
from segmamba.data.layouts import load_dataset
from segmamba.demo.simulate import make_demo_dataset
from segmamba.demo.thresholds import BaselineResult, threshold_baseline
from segmamba.errors import ConfigError, describe
from segmamba.io import read_case, read_volume
from segmamba.report.figures import case_figure
from segmamba.types import JsonDict
from segmamba.workflow import Progress, RunFolder, RunSettings, staged

HELD_OUT_SHARE = 4
"""One case in so many is held out."""
SIMULATED = (
    "These tumours are simulated on one healthy template brain: the scores show that "
    "the software works, and say nothing about patients."
)
SETTINGS = RunSettings(plan={"patch_size": [40, 40, 40]})
"""Small patches: more steps in the minutes that a demo has."""


@dataclass(frozen=True)
class DemoResult:
    """What a demo shows at its end."""

    metrics: JsonDict
    """Scores on the held-out cases, as `metrics.json` holds them."""
    baseline: BaselineResult | None
    """What thresholds reach on the same cases, for the simulated data."""
    table: tuple[str, tuple[str, ...], list[tuple[str, ...]]]
    """Title, header and rows."""
    lines: tuple[str, ...]
    """Where everything is, and what the scores mean."""


def run_demo(
    output: Path | str,
    *,
    data: Path | str | None = None,
    max_time_s: float | None = 180.0,
    device: str = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> DemoResult:
    """Do the whole job on simulated tumours, or on data of one's own.

    A demo that was broken off goes on where it stopped.

    Args:
        output: Folder for everything that is written.
        data: A data set of one's own; None simulates one.
        max_time_s: Seconds to train.
        device: "auto", "cpu", "cuda" ...
        progress: Called with steps done, all steps, what is being done, and a note.
        say: Called with a line of text at each stage.

    Returns:
        Scores, the table and the closing lines.

    Raises:
        FormatError: The data set has errors.
        ConfigError: It has fewer than two cases.
        BackendUnavailableError: nilearn, which ships the brain, is missing.
    """
    output, tell = Path(output), say or (lambda text: None)
    folder = Path(data) if data is not None else _simulated(output, progress, tell)
    report = workflow.check(folder, progress=progress)
    tell(report.conclusion())
    dataset = load_dataset(folder)
    splits = _write_splits(dataset, output / "splits.json")
    outcome = workflow.train(
        folder,
        output / "run",
        max_time_s=max_time_s,
        device=device,
        resume=True,
        config=SETTINGS if data is None else None,
        splits_file=splits,
        progress=progress,
        say=say,
    )
    metrics = outcome.metrics
    assert metrics is not None  # the split holds cases out
    held_out = list(metrics["cases"])
    baseline = None
    if data is None:
        train_ids = [case.id for case in dataset.cases if case.id not in held_out]
        baseline = threshold_baseline(
            dataset, train_ids, held_out, progress=staged(progress, "thresholds")
        )
    figure = _draw(dataset, metrics, outcome.folder, output / "figure.png")
    lines = _closing_lines(output, figure, simulated=data is None)
    return DemoResult(metrics, baseline, _table(metrics, baseline), lines)


def _simulated(
    output: Path, progress: Progress | None, tell: Callable[[str], None]
) -> Path:
    """Make the simulated data set, or find it finished from an earlier call."""
    folder, done = output / "data", output / "data.json"
    if not done.exists():
        tell("Simulating 16 brains with tumours on the MNI152 template")
        shutil.rmtree(folder, ignore_errors=True)
        make_demo_dataset(folder, progress=staged(progress, "simulating"))
        atomic.write_json(done, {"simulated": True, "note": SIMULATED})
    return folder


def _write_splits(dataset: Dataset, path: Path) -> Path:
    """Hold out the last quarter of the sorted cases."""
    ids = sorted(case.id for case in dataset.cases)
    if len(ids) < 2:
        raise ConfigError(
            describe(
                "too few cases with a label map",
                expected="2 or more",
                found=len(ids),
                file=dataset.root,
            )
        )
    held_out = ids[-max(1, len(ids) // HELD_OUT_SHARE) :]
    split = {"train": [i for i in ids if i not in held_out], "val": held_out}
    atomic.write_json(path, [split])
    return path


def _draw(dataset: Dataset, metrics: JsonDict, fold: Path, output: Path) -> Path:
    """Draw the held-out case of median Dice."""
    means = {
        case: sum(row["dice"] for row in rows.values()) / len(rows)
        for case, rows in metrics["cases"].items()
    }
    ranked = sorted(means, key=lambda case: (means[case], case))
    case = _find(dataset, ranked[len(ranked) // 2])
    assert case.label is not None
    rows = metrics["cases"][case.id]
    case_figure(
        read_case(case.images, frame=case.frame),
        read_volume(case.label).array[0],
        read_volume(fold / "validation" / f"{case.id}.nii.gz").array[0],
        output,
        labels=dataset.labels,
        channel=len(dataset.channels) - 1,
        title=case.id,
        scores={name: row["dice"] for name, row in rows.items()},
    )
    return output


def _find(dataset: Dataset, case_id: str) -> Case:
    return next(case for case in dataset.cases if case.id == case_id)


def _table(
    metrics: JsonDict, baseline: BaselineResult | None
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    header = ["region", "Dice", "HD95 mm"]
    summary = metrics["summary"]
    rows = [
        [name, _number(row["dice"]["mean"], 3), _number(row["hd95_mm"]["mean"], 1)]
        for name, row in summary.items()
    ]
    scores = [row["dice"]["mean"] for row in summary.values()]
    rows.append(["mean", _number(sum(scores) / len(scores), 3), ""])
    if baseline is not None:
        header.append("Dice of the best thresholds")
        columns = [*baseline.mean.values(), baseline.mean_dice]
        for row, value in zip(rows, columns, strict=True):
            row.append(_number(value, 3))
    title = f"Held-out cases ({len(metrics['cases'])})"
    return title, tuple(header), [tuple(row) for row in rows]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _closing_lines(output: Path, figure: Path, *, simulated: bool) -> tuple[str, ...]:
    fold = RunFolder(output / "run").fold("0")
    lines = [
        f"picture        {figure}",
        f"label maps     {fold / 'validation'}",
        f"training curve {fold / 'curve.png'}",
        f"scores         {fold / 'metrics.json'}",
        f"model          {fold / 'model.safetensors'}",
        f"checkpoint     {fold / 'checkpoint.safetensors'}",
        f"segment more   segmamba predict {output / 'run'} SCAN -o OUT",
    ]
    return (*lines, SIMULATED) if simulated else tuple(lines)
