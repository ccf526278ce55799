"""The command line: one dataclass a command, each a few lines onto the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

import segmamba
from segmamba.console import (
    ProgressDisplay,
    explain,
    format_duration,
    print_table,
    say,
    say_error,
    showing_warnings,
)
from segmamba.errors import ConfigError, describe

if TYPE_CHECKING:
    from segmamba.types import JsonDict

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True)
class Check:
    """Find every problem of a data set, by file; exit code 1 if there is any."""

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """Folder of a data set (Decathlon, nnU-Net raw, BraTS), or a CSV file."""
    json: Path | None = None
    """Also write everything found to this JSON file."""
    workers: int | None = None
    """Cases read at once; default: the number of cores."""

    def run(self) -> int:
        """Check and print one table."""
        from segmamba import atomic, workflow

        with ProgressDisplay() as progress:
            report = workflow.check(self.data, workers=self.workers, progress=progress)
        if self.json is not None:
            atomic.write_json(self.json, report.to_dict())
        rows = report.rows()
        if rows:
            print_table("Problems", ("severity", "case", "file", "problem"), rows)
        say(report.conclusion())
        return 0 if report.ok else 1


@dataclass(frozen=True)
class Plan:
    """Write fingerprint.json and plan.json, readable and editable."""

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """Folder of a data set, or a CSV file."""
    output: Output
    """Run folder."""
    preset: str | None = None
    """Network; default: segmamba-light on a CPU, segmamba on a GPU."""
    device: str = "auto"
    """Device to plan for: auto, cpu, cuda."""
    memory_mib: float | None = None
    """Device memory to plan for; default: what the device has."""
    config: Path | None = None
    """YAML file of settings that replace the planned ones."""

    def run(self) -> int:
        """Plan and print the decisions."""
        from segmamba import workflow

        with ProgressDisplay() as progress:
            plan = workflow.plan(
                self.data,
                self.output,
                preset=self.preset,
                device=self.device,
                memory_mib=self.memory_mib,
                config=self.config,
                progress=progress,
            )
        print_table("Plan", ("what", "value"), workflow.describe_plan(plan))
        say(f"Written to {self.output / 'plan.json'}; edit it as you like.")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a network; does whatever comes before it and is missing."""

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """Folder of a data set, or a CSV file."""
    output: Output
    """Run folder."""
    preset: str | None = None
    """Network; default: segmamba-light on a CPU, segmamba on a GPU."""
    fold: str = "0"
    """Fold of the splits to hold out, or all to train on every case."""
    cross_validate: FlagCreatePairsOff[bool] = False
    """Train all folds, sum up their scores and decide the post-processing; goes on
    where an earlier call ended."""
    max_time: str | None = None
    """Time to train (each fold), such as 10m or 1h30m; the schedule follows the
    clock."""
    max_epochs: int | None = None
    """Epochs to train; default 1000 if no time is given."""
    device: str = "auto"
    """auto, cpu or cuda."""
    resume: FlagCreatePairsOff[bool] = False
    """Go on from the last saved state."""
    config: Path | None = None
    """YAML file of settings (sections preset, network, plan, train)."""
    splits: Path | None = None
    """JSON file of splits of one's own: a list of {"train": [...], "val": [...]}."""
    split: Literal["5-fold", "70-10-20"] = "5-fold"
    """Five folds, or the paper's single split."""
    seed: int | None = None
    """Seed of weights, patches and augmentation."""

    def run(self) -> int:
        """Train, then validate on whole volumes."""
        from segmamba import workflow

        if self.cross_validate:
            return self._cross_validate()
        with ProgressDisplay() as progress:
            result = workflow.train(
                self.data,
                self.output,
                preset=self.preset,
                fold=self.fold,
                max_time_s=parse_duration(self.max_time),
                max_epochs=self.max_epochs,
                device=self.device,
                resume=self.resume,
                config=self.config,
                splits_file=self.splits,
                split=self.split,
                seed=self.seed,
                progress=progress,
                say=say,
            )
        if result.metrics is not None:
            print_summary(result.metrics)
        say(f"Trained in {format_duration(result.seconds)}; all of it is in:")
        say(f"  {result.folder}")
        return 0

    def _cross_validate(self) -> int:
        from segmamba import workflow
        from segmamba.workflow.fold_tables import folds_table, postprocessing_table

        if self.fold != "0":
            raise ConfigError(
                describe(
                    "--cross-validate trains all folds",
                    expected="no --fold beside it",
                    found=f"--fold {self.fold}",
                )
            )
        with ProgressDisplay() as progress:
            result = workflow.cross_validate(
                self.data,
                self.output,
                preset=self.preset,
                max_time_s=parse_duration(self.max_time),
                max_epochs=self.max_epochs,
                device=self.device,
                config=self.config,
                splits_file=self.splits,
                split=self.split,
                seed=self.seed,
                progress=progress,
                say=say,
            )
        print_summary(result.scores)
        print_table(*folds_table(result.scores))
        print_table(*postprocessing_table(result.postprocessing))
        say(f"Trained in {format_duration(result.seconds)}; all of it is in:")
        say(f"  {result.folder}")
        return 0


@dataclass(frozen=True)
class Postprocess:
    """Decide the post-processing of a run from the cases that its folds held out."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder, as written by train."""

    def run(self) -> int:
        """Decide, store and print what was tried."""
        from segmamba import workflow
        from segmamba.workflow.fold_tables import postprocessing_table

        with ProgressDisplay() as progress:
            decided = workflow.postprocess(self.run_folder, progress=progress)
        print_table(*postprocessing_table(decided))
        say(f"Written to {self.run_folder / 'postprocessing.json'}; predict does it.")
        return 0


@dataclass(frozen=True)
class Predict:
    """Segment scans with a trained run."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder, as written by train."""
    input: Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT")]
    """A scan, the channels of one in order, a folder of scans, a data set, or a folder
    or archive of DICOM series."""
    output: Output
    """Folder to write to; or a file, for a single scan."""
    device: str = "auto"
    """auto, cpu or cuda."""
    mirror: bool = True
    """Average over mirrorings: better, 8 times slower."""
    overlap: float = 0.5
    """Overlap of neighbouring windows, 0 to under 1."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type the network computes in; auto is bf16 where the device has units for it."""
    probabilities: FlagCreatePairsOff[bool] = False
    """Also write probabilities."""
    folds: tuple[str, ...] | None = None
    """Folds to average; default: all that are trained."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Predict finished cases again."""
    series: tuple[str, ...] | None = None
    """Of DICOM: number, description or UID of the series of each channel, in order."""
    dicom_seg: FlagCreatePairsOff[bool] = False
    """Also write DICOM-SEG, for DICOM scans."""
    seg_type: Literal["BINARY", "LABELMAP"] = "BINARY"
    """Kind of DICOM-SEG; LABELMAP is smaller, but unknown to older viewers."""
    segments: Path | None = None
    """JSON file of codes and colours of the labels in DICOM-SEG."""
    postprocessing: bool = True
    """Do what the run's postprocessing.json says, if there is one."""

    def run(self) -> int:
        """Predict; exit code 1 if any case failed."""
        from segmamba import workflow
        from segmamba.inference.dicom_study import SegOutput
        from segmamba.io.dicom_segments import load_descriptions

        described = load_descriptions(self.segments) if self.segments else {}
        seg = SegOutput(self.seg_type, described) if self.dicom_seg else None
        with ProgressDisplay() as progress:
            summary = workflow.predict(
                self.run_folder,
                self.input,
                self.output,
                device=self.device,
                mirror=self.mirror,
                overlap=self.overlap,
                precision=self.precision,
                probabilities=self.probabilities,
                folds=self.folds,
                overwrite=self.overwrite,
                series=self.series,
                dicom_seg=seg,
                postprocessing=self.postprocessing,
                progress=progress,
            )
        for case, problem in summary.failed.items():
            say_error(f"{case}: {problem}")
        say(
            f"{len(summary.done)} predicted, {len(summary.skipped)} already there, "
            f"{len(summary.failed)} failed; in {self.output}"
        )
        return 1 if summary.failed else 0


@dataclass(frozen=True)
class Evaluate:
    """Score label maps against references."""

    predictions: Annotated[Positional[Path], arg(metavar="PREDICTIONS")]
    """Folder of predicted label maps."""
    references: Annotated[Positional[Path], arg(metavar="REFERENCES")]
    """Folder of reference label maps, or a data set."""
    output: Output
    """JSON file to write."""
    labels: Path | None = None
    """dataset.json that names labels and regions."""
    tolerance_mm: float = 1.0
    """Tolerance of the surface Dice."""
    lesion_wise: FlagCreatePairsOff[bool] = False
    """Also score lesion by lesion, as the BraTS challenge does."""
    lesion_task: Literal["GLI", "SSA", "PED", "MEN", "MET"] = "GLI"
    """BraTS 2023 task whose lesion-wise rules to take."""
    figure: Path | None = None
    """Also draw the worst cases to this PNG file."""

    def run(self) -> int:
        """Evaluate, write the JSON and print the summary."""
        from segmamba import workflow

        with ProgressDisplay() as progress:
            metrics = workflow.evaluate(
                self.predictions,
                self.references,
                self.output,
                labels=self.labels,
                tolerance_mm=self.tolerance_mm,
                lesions=self.lesion_task if self.lesion_wise else None,
                figure=self.figure,
                progress=progress,
            )
        print_summary(metrics)
        say(f"Written to {self.output}")
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare models on the same cases: intervals, paired tests, ranking, cost."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
    """Two or more run folders, folders of one fold, or metrics.json files."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder for comparison.json, .md, .tex, .html and .png."""
    names: tuple[str, ...] | None = None
    """What to call the models; default: their folders' names."""
    metrics: tuple[str, ...] | None = None
    """Metrics; default: Dice, HD95, surface Dice, and lesion-wise if all have them."""
    labels: tuple[str, ...] | None = None
    """Labels; default: all."""
    resamples: int = 2000
    """Bootstrap draws of intervals and rankings."""
    seed: int = 12345
    """Of all draws."""

    def run(self) -> int:
        """Compare and print the tables."""
        from segmamba.report.comparison_tables import comparison_tables
        from segmamba.workflow.compare import compare

        comparison = compare(
            self.runs,
            self.output,
            names=self.names,
            metrics=self.metrics,
            labels=self.labels,
            resamples=self.resamples,
            seed=self.seed,
        )
        for table in comparison_tables(comparison):
            print_table(table.title, table.header, table.rows)
            say(table.note)
        if self.output is not None:
            say(f"Written to {self.output / 'comparison.html'} and beside it.")
        return 0


@dataclass(frozen=True)
class Info:
    """Say what is installed and usable here; or what a run is."""

    run_folder: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """Run folder."""

    def run(self) -> int:
        """Print versions, devices and back ends, or the run's parts."""
        from segmamba import workflow

        for title, rows in workflow.info(self.run_folder).items():
            print_table(title, ("what", "value"), rows)
        return 0


@dataclass(frozen=True)
class Demo:
    """Do the whole job on simulated brain tumours, or on data of one's own."""

    output: Output
    """Folder to write to."""
    data: Path | None = None
    """A data set of one's own instead of the simulated one."""
    max_time: str = "3m"
    """Time to train."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> int:
        """Run all steps and say where everything is."""
        from segmamba.demo import run_demo

        with ProgressDisplay() as progress:
            result = run_demo(
                self.output,
                data=self.data,
                max_time_s=parse_duration(self.max_time),
                device=self.device,
                progress=progress,
                say=say,
            )
        print_table(*result.table)
        for line in result.lines:
            say(line)
        return 0


@dataclass(frozen=True)
class Benchmark:
    """Measure speed and memory here; exit code 1 if a check fails."""

    name: Annotated[
        Positional[
            Literal[
                "layer", "network", "volume", "size", "scan", "predict", "efficiency"
            ]
        ],
        arg(metavar="NAME"),
    ]
    """layer, network, volume, size, scan, predict or efficiency."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """JSON file to write, anew after every row."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision; auto: bf16 where the device computes it natively, else fp32."""
    seconds: float = 1.5
    """Time for the rounds of one measurement."""
    quick: FlagCreatePairsOff[bool] = False
    """Tiny shapes: shows that it works, measures nothing of interest."""
    backend: str = "auto"
    """Back end of the scans."""
    peers: bool = True
    """Measure other networks and kernels too, where they are installed."""
    case: Path | None = None
    """Folder with one case's four scans, for predict; default: a simulated case."""
    figure: Path | None = None
    """Also draw speed against size to this PNG file (size and scan)."""

    def run(self) -> int:
        """Measure, then print one table."""
        from segmamba.benchmark import (
            HEADER,
            BenchmarkSettings,
            run_benchmark,
            table_row,
        )
        from segmamba.report.benchmark_figure import benchmark_figure

        settings = BenchmarkSettings(
            device=self.device,
            dtype=self.dtype,
            seconds=self.seconds,
            quick=self.quick,
            backend=self.backend,
            peers=self.peers,
            case=self.case,
        )
        record = run_benchmark(self.name, settings, out=self.out, say=say)
        rows = map(table_row, record.data["measurements"])
        print_table(record.data["what"], HEADER, rows)
        for side, ratio in record.data.get("cost_over_base", {}).items():
            base = record.data["base_side"]
            say(f"{side}^3: {ratio:.3f} times the time per voxel of {base}^3")
        for failure in record.failures:
            say_error(failure)
        if self.figure is not None and not record.failures:
            benchmark_figure(record.data, self.figure)
            say(f"Drawn to {self.figure}")
        if self.out is not None:
            say(f"Written to {self.out}")
        return 1 if record.failures else 0


COMMANDS = {
    "check": Check,
    "plan": Plan,
    "train": Train,
    "postprocess": Postprocess,
    "predict": Predict,
    "evaluate": Evaluate,
    "compare": Compare,
    "info": Info,
    "demo": Demo,
    "benchmark": Benchmark,
}


def parse_duration(text: str | None) -> float | None:
    """Read a time such as 90s, 10m or 1h30m; a bare number means seconds.

    Args:
        text: The time, or None.

    Returns:
        Seconds, or None.

    Raises:
        ConfigError: It isn't such a time, or is zero.
    """
    if text is None:
        return None
    match = re.fullmatch(
        r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?",
        text.strip(),
    )
    hours, minutes, seconds = match.groups(default="0") if match else ("0",) * 3
    total = float(hours) * 3600 + float(minutes) * 60 + float(seconds)
    if total <= 0:
        raise ConfigError(
            describe("bad time", expected="such as 90s, 10m or 1h30m", found=text)
        )
    return total


def print_summary(metrics: JsonDict) -> None:
    """Print mean and 95 % interval of Dice and HD95 for each label."""
    shown = {"dice": "Dice", "hd95_mm": "HD95 mm"}
    summary = metrics["summary"]
    if all("lesion_dice" in row for row in summary.values()):
        shown |= {"lesion_dice": "lesion Dice", "lesion_hd95_mm": "lesion HD95 mm"}
    rows = []
    for label, row in summary.items():
        cells = [_mean_and_interval(row[name]) for name in shown]
        rows.append((label, *cells, str(row["dice"]["n"])))
    header = (f"{name} (95 % interval)" for name in shown.values())
    print_table("Scores on whole volumes", ("label", *header, "cases"), rows)


def _mean_and_interval(row: JsonDict) -> str:
    if row["mean"] is None:
        return "-"
    low, high = row["ci95"]
    return f"{row['mean']:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; default: the process's.

    Returns:
        The exit code: 0 if all went well, 1 for an error, 130 when interrupted.
    """
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="segmamba",
        description=segmamba.__doc__,
        args=None if arguments is None else list(arguments),
    )
    try:
        with showing_warnings():
            return command.run()
    except KeyboardInterrupt:
        say_error("interrupted; what was finished is kept.")
        return 130
    except Exception as error:
        say_error(explain(error))
    return 1


if __name__ == "__main__":
    sys.exit(main())
