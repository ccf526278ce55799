"""Many cases into a folder: finished ones skipped, broken ones reported."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from segmamba.atomic import read_json, write_json
from segmamba.checkpoint import versions
from segmamba.devices import peak_memory_mib
from segmamba.errors import ConfigError, FormatError, SegMambaError, describe
from segmamba.inference.dicom_study import SegOutput
from segmamba.inference.find import InputCase, Which, find_cases
from segmamba.inference.predictor import Predictor
from segmamba.inference.sliding_window import Progress
from segmamba.io import is_scan, read_header, strip_suffix
from segmamba.types import JsonDict

__all__ = [
    "CaseResult",
    "InputCase",
    "PredictionSummary",
    "Which",
    "find_cases",
    "predict_cases",
]

MANIFEST = "predictions.json"
"""The record of a folder of predictions."""

SUFFIX = ".nii.gz"
"""Ending of every label map that is written, whatever the scan's format."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseResult:
    """What became of one case."""

    id: str
    """The case."""
    status: Literal["done", "skipped", "failed"]
    """Skipped: its label map was there already."""
    images: tuple[Path, ...]
    """Its files."""
    output: Path | None = None
    """Its label map, unless it failed."""
    seconds: float = 0.0
    """Reading, prediction and writing together."""
    error: str | None = None
    """Why it failed."""


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
    which: Which = "all",
    dicom_seg: SegOutput | None = None,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Predict cases one by one into a folder.

    Writes <case>.nii.gz, with `probabilities` also probabilities/<case>.nii.gz (4D,
    float32, one volume for each output), each whole or not at all, and after every case
    predictions.json: model, options, versions, and for each case files, seconds and
    errors. A rerun goes on where the last one ended.

    Args:
        predictor: The model.
        inputs: What `find_cases` takes, or its result.
        out_folder: Made if it is missing. A name that ends as a scan's does
            (label.nii.gz) is the file to write for a single case; it gets no record.
        overwrite: Predict finished cases again.
        probabilities: Write probabilities too.
        which: Of a data set: all cases, or those with or without a label map.
        dicom_seg: Write <case>.dcm too, for cases that are DICOM.
        progress: Called with cases done, their number, and case and window at work.

    Returns:
        What was done, skipped and failed. A broken case doesn't stop the others.

    Raises:
        FormatError: No case is found, or the folder can't be written to.
        ConfigError: Two cases have one name; the folder holds another model's
            predictions, or the file is there, and `overwrite` is off; or one file is
            named for several cases; or `dicom_seg` is asked for other scans.
        BackendUnavailableError: What writes DICOM-SEG isn't installed.
    """
    cases = _cases(predictor, inputs, which)
    if dicom_seg is not None:
        _check_dicom(cases, dicom_seg, predictor)
    folder = Path(out_folder)
    if is_scan(folder) and not folder.is_dir():
        return _predict_to_file(
            predictor, cases, folder, overwrite, probabilities, dicom_seg, progress
        )
    record = _Record.open(folder, predictor, overwrite)
    results: list[CaseResult] = []
    for index, case in enumerate(cases):
        steps = _Steps(progress, index, len(cases))
        done = not overwrite and _is_done(
            case, folder, probabilities, dicom_seg is not None
        )
        if done:
            result = CaseResult(case.id, "skipped", case.images, _output(folder, case))
        else:
            maps = _probabilities(folder, case) if probabilities else None
            target = _output(folder, case)
            result = _predict_case(predictor, case, target, maps, dicom_seg, steps)
        results.append(result)
        record.add(result, predictor)
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


def _predict_to_file(
    predictor: Predictor,
    cases: list[InputCase],
    file: Path,
    overwrite: bool,
    probabilities: bool,
    dicom_seg: SegOutput | None,
    progress: Progress | None,
) -> PredictionSummary:
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
    maps = file.with_name(f"{strip_suffix(file)}_probabilities{SUFFIX}")
    steps = _Steps(progress, 0, 1)
    result = _predict_case(
        predictor, cases[0], file, maps if probabilities else None, dicom_seg, steps
    )
    return PredictionSummary((result,))


def _predict_case(
    predictor: Predictor,
    case: InputCase,
    target: Path,
    maps: Path | None,
    dicom_seg: SegOutput | None,
    steps: _Steps,
) -> CaseResult:
    start = time.perf_counter()
    output: Path | None = None
    try:
        if case.problem is not None:
            raise FormatError(case.problem)
        prediction = predictor.predict(
            case.scan(),
            probabilities=maps is not None,
            case=f"case {case.id}",
            progress=steps,
        )
        if maps is not None:  # first: a label map says that the case is finished
            prediction.save_probabilities(maps)
        if dicom_seg is not None:
            dicom_seg.write(
                _segmentation(target),
                prediction.label_map,
                case.series[0],
                predictor.scheme,
            )
        output, error = prediction.save(target), None
    except SegMambaError as problem:
        error = str(problem)
    except OSError as problem:
        error = describe("can't write the prediction", found=problem, file=target)
    except Exception as problem:  # the other cases must not suffer from it
        _log.exception("case %s failed", case.id)
        error = f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - start
    status = "done" if error is None else "failed"
    return CaseResult(case.id, status, case.images, output, seconds, error)


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


@dataclass
class _Record:
    """The folder's predictions.json, kept up to date."""

    path: Path
    data: JsonDict

    @classmethod
    def open(cls, folder: Path, predictor: Predictor, overwrite: bool) -> _Record:
        path = folder / MANIFEST
        head = {
            "model": predictor.identity,
            "options": predictor.options,
            "outputs": list(predictor.names),
        }
        head = json.loads(json.dumps(head))  # as it will be read back
        old = read_json(path) if path.is_file() and not overwrite else {}
        changed = [key for key in head if key in old and old[key] != head[key]]
        if changed:
            raise ConfigError(
                describe(
                    "the folder holds predictions of another model or other options",
                    expected=", ".join(f"{key} {head[key]}" for key in changed),
                    found=", ".join(f"{key} {old[key]}" for key in changed),
                    file=path,
                    remedy="Use another folder, or --overwrite.",
                )
            )
        record = cls(path, {**head, "versions": versions(), "cases": {}})
        record.data["cases"].update(old.get("cases", {}))
        record.write()
        return record

    def add(self, result: CaseResult, predictor: Predictor) -> None:
        cases = self.data["cases"]
        if result.status == "skipped" and result.id in cases:
            return
        cases[result.id] = {
            "status": result.status,
            "images": [str(path) for path in result.images],
            "output": result.output.name if result.output else None,
            "seconds": round(result.seconds, 3),
            "device": str(predictor.device),
            "precision": predictor.precision,
            "error": result.error,
        }
        self.data["peak_memory_mib"] = peak_memory_mib(predictor.device)
        self.write()

    def write(self) -> None:
        try:
            write_json(self.path, self.data)
        except OSError as error:
            raise FormatError(
                describe(
                    "can't write to the folder of predictions",
                    found=error,
                    file=self.path.parent,
                    remedy="Make room, or choose a folder that you may write to.",
                )
            ) from error


def _output(folder: Path, case: InputCase) -> Path:
    return folder / f"{case.id}{SUFFIX}"


def _probabilities(folder: Path, case: InputCase) -> Path:
    return folder / "probabilities" / f"{case.id}{SUFFIX}"


def _segmentation(target: Path) -> Path:
    """Name the DICOM-SEG beside a label map."""
    return target.with_name(f"{strip_suffix(target)}.dcm")


def _check_dicom(
    cases: list[InputCase], dicom_seg: SegOutput, predictor: Predictor
) -> None:
    others = [case for case in cases if not case.series and case.problem is None]
    if others:
        raise ConfigError(
            describe(
                "only what was DICOM can be written as DICOM-SEG",
                expected="a folder or archive of DICOM series",
                found=f"case {others[0].id}",
                file=others[0].images[0] if others[0].images else None,
                remedy="Leave out --dicom-seg.",
            )
        )
    dicom_seg.check(predictor.scheme)


def _is_done(
    case: InputCase, folder: Path, probabilities: bool, dicom_seg: bool
) -> bool:
    """Tell whether whole files of the scan's size are there."""
    if dicom_seg and not _segmentation(_output(folder, case)).is_file():
        return False
    files = [_output(folder, case)]
    files += [_probabilities(folder, case)] if probabilities else []
    if case.problem is not None or not all(file.is_file() for file in files):
        return False
    try:
        first = case.series[0] if case.series else read_header(case.images[0])
        shape = first.shape
        return all(read_header(file).shape == shape for file in files)
    except SegMambaError:
        return False
