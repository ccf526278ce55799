"""Commands from a model to segmentations, scores and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from segmamba.cli.words import (
    Output,
    print_calibration,
    print_summary,
    require_beside,
)
from segmamba.console import (
    ProgressDisplay,
    print_table,
    say,
    say_error,
)


@dataclass(frozen=True)
class Predict:
    """Segment scans with a trained run."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder, as written by train."""
    input: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="INPUT", help_behavior_hint="(required)"),
    ]
    """A scan, its channels in order, a folder of scans, a data set, or DICOM series."""
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
    uncertainty: FlagCreatePairsOff[bool] = False
    """Also write maps of uncertainty; volumes' spread goes into the manifest."""
    snapshots: FlagCreatePairsOff[bool] = False
    """Take the weights kept while training as more samples of uncertainty."""
    whole_volume: FlagCreatePairsOff[bool] = False
    """Show the network the whole scan at once, not windows: much more memory."""
    folds: tuple[str, ...] | None = None
    """Folds to average; default: all that are trained."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Predict finished cases again."""
    series: tuple[str, ...] | None = None
    """Of DICOM: number, description or UID of the series of each channel, in order."""
    frames: FlagCreatePairsOff[bool] = False
    """Take the fourth axis of 4D scans as frames, each a case, not as channels."""
    dicom_seg: FlagCreatePairsOff[bool] = False
    """Also write DICOM-SEG, for DICOM scans."""
    seg_type: Literal["BINARY", "LABELMAP"] = "BINARY"
    """Kind of DICOM-SEG; LABELMAP is smaller, but unknown to older viewers."""
    rtstruct: FlagCreatePairsOff[bool] = False
    """Also write RTSTRUCT (contours), for DICOM scans."""
    segments: Path | None = None
    """JSON file of codes and colours of the labels in DICOM-SEG and RTSTRUCT."""
    postprocessing: bool = True
    """Do what the run's postprocessing.json says, if there is one."""

    def run(self) -> int:
        """Predict; exit code 1 if any case failed."""
        from segmamba.devices import wake

        self._check()
        wake(self.device)  # while the rest is imported and the model is read
        from segmamba import workflow
        from segmamba.inference.dicom_study import SegOutput
        from segmamba.io.dicom_segments import load_descriptions

        described = load_descriptions(self.segments) if self.segments else {}
        dicom = [SegOutput(self.seg_type, described)] if self.dicom_seg else []
        dicom += [SegOutput("RTSTRUCT", described)] if self.rtstruct else []
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
                uncertainty=self.uncertainty or self.snapshots,
                snapshots=self.snapshots,
                whole_volume=self.whole_volume,
                folds=self.folds,
                overwrite=self.overwrite,
                series=self.series,
                frames=self.frames,
                dicom=dicom,
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

    def _check(self) -> None:
        require_beside(
            "--seg-type",
            "--dicom-seg",
            is_given=self.seg_type != "BINARY",
            is_there=self.dicom_seg,
        )
        require_beside(
            "--segments",
            "--dicom-seg or --rtstruct",
            is_given=self.segments is not None,
            is_there=self.dicom_seg or self.rtstruct,
        )


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
    calibration: Path | None = None
    """Also draw to this PNG file how well predicted uncertainty tells of errors."""

    def run(self) -> int:
        """Evaluate, write the JSON and print the summary."""
        from segmamba import workflow

        require_beside(
            "--lesion-task",
            "--lesion-wise",
            is_given=self.lesion_task != "GLI",
            is_there=self.lesion_wise,
        )
        with ProgressDisplay() as progress:
            metrics = workflow.evaluate(
                self.predictions,
                self.references,
                self.output,
                labels=self.labels,
                tolerance_mm=self.tolerance_mm,
                lesions=self.lesion_task if self.lesion_wise else None,
                figure=self.figure,
                calibration=self.calibration,
                progress=progress,
            )
        print_summary(metrics)
        for kind, names in metrics["unmatched"].items():
            if names:
                say(f"Without a counterpart, so not scored: {len(names)} of {kind}.")
        if self.calibration is not None:
            print_calibration(metrics["calibration"])
        share = metrics["differing_voxels"]["largest"]
        say(f"At most {share:.3g} of a case's voxels differ.")
        say(f"Written to {self.output}")
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare models on the same cases: intervals, paired tests, ranking, cost."""

    runs: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="RUN", help_behavior_hint="(required)"),
    ]
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
