"""Many cases into a folder: finished ones skipped, broken ones reported."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from segmamba.errors import ConfigError, FormatError, SegMambaError, describe
from segmamba.inference.dicom_study import SegOutput
from segmamba.inference.extras import SUFFIX, CaseFiles, Extras
from segmamba.inference.find import InputCase, Which, find_cases
from segmamba.inference.predictor import Predictor
from segmamba.inference.record import (
    CaseResult,
    PredictionRecord,
    describe_inputs,
    describe_outputs,
    describe_prediction,
)
from segmamba.inference.sliding_window import Progress
from segmamba.io import is_scan
from segmamba.lock import folder_lock
from segmamba.manifest import NAME, Session, manifest_path
from segmamba.types import JsonDict

__all__ = [
    "CaseResult",
    "InputCase",
    "PredictionSummary",
    "Which",
    "find_cases",
    "predict_cases",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionSummary:
    """What became of all cases."""

    results: tuple[CaseResult, ...] = field(default=())
    """One for each case, in the order of their ids."""

    @property
    def done(self) -> tuple[str, ...]:
        """Cases predicted now."""
        return tuple(item.id for item in self.results if item.status == "done")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Cases whose label map was there already."""
        return tuple(item.id for item in self.results if item.status == "skipped")

    @property
    def failed(self) -> dict[str, str]:
        """Cases that failed, and why."""
        failed = (item for item in self.results if item.status == "failed")
        return {item.id: item.error or "" for item in failed}

    @property
    def outputs(self) -> dict[str, Path]:
        """Label maps that are there now, by case."""
        return {item.id: item.output for item in self.results if item.output}


def predict_cases(
    predictor: Predictor,
    inputs: str | Path | Sequence[str | Path] | Sequence[InputCase],
    out_folder: str | Path,
    *,
    overwrite: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    which: Which = "all",
    dicom: Sequence[SegOutput] = (),
    session: Session | None = None,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Predict cases one by one into a folder.

    Writes <case>.nii.gz, with `probabilities` also probabilities/<case>.nii.gz (4D,
    float32, one volume for each output), with `uncertainty` also entropy/<case>.nii.gz,
    mutual_information/ and confidence/, each whole or not at all, and after every case
    manifest.json: model, options, versions, and for each case files, volumes, seconds
    and errors. A rerun goes on where the last one ended.

    Args:
        predictor: The model.
        inputs: What `find_cases` takes, or its result.
        out_folder: Made if it is missing. A name that ends as a scan's does
            (label.nii.gz) is the file to write for a single case; its manifest is
            label_manifest.json.
        overwrite: Predict finished cases again.
        probabilities: Write probabilities too.
        uncertainty: Write maps of uncertainty too; the manifest gets volumes with
            their spread and the Dice to be expected.
        which: Of a data set: all cases, or those with or without a label map.
        dicom: Write DICOM-SEG (<case>.dcm) or RTSTRUCT (<case>_rtstruct.dcm) too, for
            cases that are DICOM.
        session: The command's call, for the manifest; None begins one here.
        progress: Called with cases done, their number, and case and window at work.

    Returns:
        What was done, skipped and failed. A broken case doesn't stop the others.

    Raises:
        FormatError: No case is found, or the manifest can't be written.
        ConfigError: Two cases have one name; the folder can't be written to, another
            prediction writes to it, or it holds another model's predictions, or the
            file is there, and `overwrite` is off; or one file is named for several
            cases; or `dicom` is asked for other scans.
        BackendUnavailableError: What writes DICOM isn't installed.
    """
    cases = _cases(predictor, inputs, which)
    extras = Extras(probabilities, uncertainty, tuple(dicom))
    extras.check(cases, predictor.scheme)
    folder = Path(out_folder)
    alone = is_scan(folder) and not folder.is_dir()
    if alone:
        _check_file(folder, cases, overwrite)
    results: list[CaseResult] = []
    with nullcontext() if alone else folder_lock(folder, "prediction"):
        record = PredictionRecord.open(
            manifest_path(folder) if alone else folder / NAME,
            predictor,
            session or Session("predict"),
            extras.describe(),
            overwrite=overwrite or alone,
        )
        if not alone:
            extras.clean(folder)
        for index, case in enumerate(cases):
            files = CaseFiles(folder if alone else folder / f"{case.id}{SUFFIX}", alone)
            if not overwrite and extras.is_done(case, files):
                result = CaseResult(
                    *(case.id, "skipped", case.images, files.label_map),
                    facts={} if case.id in record.cases else _facts_of_skipped(case),
                )
            else:
                steps = _Steps(progress, index, len(cases))
                result = _predict_case(predictor, case, files, extras, steps)
            results.append(result)
            record.add(result)
            if progress is not None:
                progress(index + 1, len(cases), case.id)
    return PredictionSummary(tuple(results))


def _cases(
    predictor: Predictor,
    inputs: str | Path | Sequence[str | Path] | Sequence[InputCase],
    which: Which,
) -> list[InputCase]:
    if isinstance(inputs, (str, Path)):
        cases = find_cases(inputs, predictor.channels, which=which)
    else:
        given = [item for item in inputs if isinstance(item, InputCase)]
        files = [item for item in inputs if not isinstance(item, InputCase)]
        cases = given or find_cases(files, predictor.channels, which=which)
    names = Counter(case.id for case in cases)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigError(
            describe(
                "two scans would be written to one file",
                found=", ".join(f"{name}{SUFFIX}" for name in twice[:5]),
                remedy="Rename them, or predict them into different folders.",
            )
        )
    return cases


def _facts_of_skipped(case: InputCase) -> JsonDict:
    return {**describe_inputs(case), "warnings": []}


def _check_file(file: Path, cases: list[InputCase], overwrite: bool) -> None:
    if len(cases) != 1:
        raise ConfigError(
            describe(
                "one file can't hold several cases",
                expected="a folder to write to",
                found=f"{len(cases)} cases",
                file=file,
            )
        )
    if file.exists() and not overwrite:
        raise ConfigError(
            describe("the file is there already", file=file, remedy="Use --overwrite.")
        )


def _predict_case(
    predictor: Predictor,
    case: InputCase,
    files: CaseFiles,
    extras: Extras,
    steps: _Steps,
) -> CaseResult:
    start = time.perf_counter()
    target, output, error = files.label_map, None, None
    facts: JsonDict = {}
    with Session("predict") as heard:
        try:
            facts |= describe_inputs(case)
            if case.problem is not None:
                raise FormatError(case.problem)
            prediction = predictor.predict(
                case.scan(),
                probabilities=extras.probabilities,
                uncertainty=extras.uncertainty,
                case=f"case {case.id}",
                progress=steps,
            )
            # First: a label map says that the case is finished.
            written = extras.write(prediction, files, case, predictor.scheme)
            output = prediction.save(target)
            facts |= describe_prediction(prediction, predictor.scheme)
            facts |= describe_outputs([output, *written], target.parent)
        except SegMambaError as problem:
            error = str(problem)
        except OSError as problem:
            error = describe("can't write the prediction", found=problem, file=target)
        except Exception as problem:  # the other cases must not suffer from it
            _log.exception("case %s failed", case.id)
            error = f"{type(problem).__name__}: {problem}"
    facts["warnings"] = heard.warnings
    status = "done" if error is None else "failed"
    seconds = time.perf_counter() - start
    return CaseResult(case.id, status, case.images, output, seconds, error, facts)


@dataclass(frozen=True)
class _Steps:
    """Turns windows of a case into progress of the whole job."""

    progress: Progress | None
    index: int
    count: int

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.progress is not None:
            text = f"{what}, window {done} of {total}"
            self.progress(self.index, self.count, text)
