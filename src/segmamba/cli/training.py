"""Commands from a data set to a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from segmamba.cli.words import Output, parse_duration, print_summary
from segmamba.console import (
    ProgressDisplay,
    format_duration,
    print_table,
    say,
)
from segmamba.errors import ConfigError, describe


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
    """Network, such as segmamba-light; default: by the device and the scans' size."""
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
    """Network, such as segmamba-light; default: by the device and the scans' size."""
    fold: str = "0"
    """Fold of the splits to hold out, or all to train on every case."""
    cross_validate: FlagCreatePairsOff[bool] = False
    """Train all folds, sum up, decide post-processing; goes on where it ended."""
    max_time: str | None = None
    """Time to train (each fold), such as 10m or 1h30m; the schedule follows it."""
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
