"""Find every problem of a data set before a day of training is spent on it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from segmamba.data.case_check import (
    CaseFacts,
    Problem,
    Severity,
    check_case,
    image_problems,
    shown,
    try_reading,
)
from segmamba.data.dataset import Case, Dataset
from segmamba.data.layouts import load_dataset
from segmamba.errors import ConfigError, describe
from segmamba.io import Volume, is_scan, strip_suffix
from segmamba.types import JsonDict

Progress = Callable[[int, int, str], None]

_MOST_STRAY_FILES = 20
_SPACING_FACTOR = 2.0
_FEWEST_FOR_OUTLIERS = 3
_MOST_WORKERS = 4


@dataclass(frozen=True)
class CheckReport:
    """Every problem of a data set, sorted by file."""

    problems: tuple[Problem, ...]
    num_cases: int
    """Cases with a label map."""
    num_unlabelled: int = 0
    """Cases without one."""
    name: str = ""
    root: Path = Path()
    layout: str = ""
    channels: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that spoil training or scores."""
        return tuple(item for item in self.problems if item.severity == "error")

    @property
    def notes(self) -> tuple[Problem, ...]:
        """What is odd but usable."""
        return tuple(item for item in self.problems if item.severity == "note")

    @property
    def ok(self) -> bool:
        """Whether there is no error; notes don't count."""
        return not self.errors

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Give the table: severity, case, file and problem, sorted by file."""
        return [
            (item.severity, item.case, item.file, f"{item.kind}: {item.message}")
            for item in self.problems
        ]

    def conclusion(self) -> str:
        """Sum up in one sentence."""
        cases = _count(self.num_cases, "labelled case")
        if self.num_unlabelled:
            cases += f" and {self.num_unlabelled} without a label map"
        errors, notes = len(self.errors), len(self.notes)
        return f"{cases}: {_count(errors, 'error')}, {_count(notes, 'note')}."

    def to_dict(self) -> JsonDict:
        """Give all of it as plain values for JSON."""
        return {
            "name": self.name,
            "root": str(self.root),
            "layout": self.layout,
            "channels": list(self.channels),
            "num_cases": self.num_cases,
            "num_unlabelled": self.num_unlabelled,
            "ok": self.ok,
            "num_errors": len(self.errors),
            "num_notes": len(self.notes),
            "problems": [asdict(item) for item in self.problems],
        }


def check_dataset(
    path_or_dataset: Path | str | Dataset,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file of a data set and report what is wrong.

    Args:
        path_or_dataset: A data set, or where it lies (see `load_dataset`).
        workers: Threads, each with one file in memory; None takes the number of cores,
            at most 4.
        progress: Called with cases done, cases in all, and the id of the last one.

    Returns:
        The report. Broken files are in it; they don't raise.

    Raises:
        FormatError: No data set is there at all.
        ConfigError: `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise ConfigError(describe("bad workers", expected="1 or more", found=workers))
    dataset = (
        path_or_dataset
        if isinstance(path_or_dataset, Dataset)
        else load_dataset(path_or_dataset)
    )
    count = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(count)
    try:
        facts = _check_cases(dataset, pool, progress)
        stray = list(pool.map(_check_stray, _find_stray_files(dataset)))
    finally:  # Ctrl-C must not wait for all that hasn't begun
        pool.shutdown(cancel_futures=True)
    problems = [problem for fact in facts for problem in fact.problems]
    problems += [problem for group in stray for problem in group]
    problems += _repeated_ids(dataset)
    problems += _repeated_content(dataset, facts)
    problems += _spacing_outliers(dataset, facts)
    problems += _absent_labels(dataset, facts)
    problems += _unlabelled_among_labelled(dataset)
    order = {"error": 0, "note": 1}
    problems.sort(key=lambda p: (p.file, order[p.severity], p.kind, p.case))
    return CheckReport(
        problems=tuple(problems),
        num_cases=len(dataset.cases),
        num_unlabelled=len(dataset.unlabelled),
        name=dataset.name,
        root=dataset.root,
        layout=dataset.layout,
        channels=dataset.channels,
    )


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _check_cases(
    dataset: Dataset, pool: ThreadPoolExecutor, progress: Progress | None
) -> list[CaseFacts]:
    cases = [*dataset.cases, *dataset.unlabelled]
    tasks = {
        pool.submit(check_case, dataset, case): index
        for index, case in enumerate(cases)
    }
    facts: dict[int, CaseFacts] = {}
    for done, task in enumerate(as_completed(tasks), start=1):
        index = tasks[task]
        facts[index] = task.result()
        if progress is not None:
            progress(done, len(cases), cases[index].id)
    return [facts[index] for index in range(len(cases))]


@dataclass(frozen=True)
class _Stray:
    """A scan that lies in the folder but belongs to no case."""

    path: Path
    root: Path
    kind: str
    message: str
    severity: Severity


def _find_stray_files(dataset: Dataset) -> list[_Stray]:
    """Look for scans beside those of the cases."""
    cases = [*dataset.cases, *dataset.unlabelled]
    images = {path for case in cases for path in case.images}
    labels = {case.label for case in cases if case.label is not None}
    listed = {_key(path) for path in images | labels}
    image_folders = {_key(path.parent) for path in images}
    label_folders = {_key(path.parent) for path in labels}
    if dataset.layout == "brats":
        label_folders = image_folders  # a case's files lie together
    folders = _folders_to_search(dataset, images | labels)
    found = {
        folder: [path for path in _scans(folder) if _key(path) not in listed]
        for folder in folders
    }
    stray: list[tuple[Path, str]] = []
    stems: defaultdict[str, set[str]] = defaultdict(set)
    for folder, files in found.items():
        kind = _stray_kind(_key(folder), image_folders, label_folders)
        kept = files[:_MOST_STRAY_FILES] if kind == "orphan-file" else files
        stray += [(path, kind) for path in kept]
        stems[kind].update(_stem(path) for path in kept)
    return [_weigh_stray(dataset, path, kind, stems) for path, kind in stray]


def _stray_kind(folder: str, images: set[str], labels: set[str]) -> str:
    """Tell by its folder what a stray file should have been."""
    if folder in images and folder in labels:
        return "orphan-scan"
    if folder in images:
        return "orphan-image"
    return "orphan-label" if folder in labels else "orphan-file"


def _weigh_stray(
    dataset: Dataset, path: Path, kind: str, stems: Mapping[str, set[str]]
) -> _Stray:
    """Weigh a stray file: half a pair is an error, a pair that isn't listed a note."""
    partner = {"orphan-image": "label", "orphan-label": "image"}.get(kind, "")
    paired = _stem(path) in stems.get(f"orphan-{partner}", ())
    test_folder = path.parent.name.lower() == "imagests"
    alone = kind != "orphan-file" and not paired and not test_folder
    message = "belongs to no case of the data set"
    if partner and alone:
        message += f", and there is no {partner} for it"
    is_error = alone and dataset.layout != "csv"
    return _Stray(path, dataset.root, kind, message, "error" if is_error else "note")


def _check_stray(stray: _Stray) -> list[Problem]:
    """Report the file, its size, and what is wrong inside it."""
    name = shown(stray.path, stray.root)
    volume, kind, text = try_reading(stray.path, "missing-channel")
    size = "" if volume is None else f" ({_describe_size(volume)})"
    message = stray.message + size
    problems = [Problem("", name, stray.kind, message, stray.severity)]
    if volume is None:
        problems.append(Problem("", name, kind, text))
    elif stray.kind != "orphan-label":
        inside = image_problems(volume.array)
        severity: Severity = stray.severity
        problems += [Problem("", name, kind, text, severity) for kind, text in inside]
    return problems


def _describe_size(volume: Volume) -> str:
    voxels = " x ".join(str(size) for size in volume.shape)
    return f"{voxels} voxels of {_mm(volume.spacing_mm)} mm"


def _folders_to_search(dataset: Dataset, files: Iterable[Path]) -> list[Path]:
    folders = {path.parent for path in files}
    if dataset.layout != "csv":
        for folder, inner, _ in os.walk(dataset.root):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            folders.add(Path(folder))
    unique = {_key(folder): folder for folder in sorted(folders)}
    return sorted(unique.values())


def _scans(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if is_scan(path))
    except OSError:
        return []


def _key(path: Path) -> str:
    """Give the same text for every spelling of a path; links are not followed."""
    return os.path.normcase(os.path.abspath(path))  # noqa: PTH100 (resolve follows)


def _stem(path: Path) -> str:
    stem = strip_suffix(path)
    return stem[:-5] if stem[-5:-4] == "_" and stem[-4:].isdigit() else stem


def _case_file(case: Case, dataset: Dataset) -> str:
    return shown(case.images[0], dataset.root)


def _repeated_ids(dataset: Dataset) -> list[Problem]:
    cases = [*dataset.cases, *dataset.unlabelled]
    counts = Counter(case.id for case in cases)
    return [
        Problem(
            case.id,
            _case_file(case, dataset),
            "duplicate-id",
            f"{counts[case.id]} cases have this id",
        )
        for case in cases
        if counts[case.id] > 1
    ]


def _repeated_content(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Problem]:
    groups: defaultdict[str, list[Case]] = defaultdict(list)
    for fact in facts:
        if fact.content is not None:
            groups[fact.content].append(fact.case)
    problems = []
    for cases in groups.values():
        for case in cases[1:]:
            text = f"same voxels as case {cases[0].id}"
            file = _case_file(case, dataset)
            problems.append(Problem(case.id, file, "duplicate-case", text))
    return problems


def _spacing_outliers(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Problem]:
    """Note spacings that differ twofold from the median, whatever the axis order."""
    known = [fact for fact in facts if fact.spacing_mm is not None]
    if len(known) < _FEWEST_FOR_OUTLIERS:
        return []
    spacings = np.array([sorted(fact.spacing_mm or ()) for fact in known])
    median = np.median(spacings, axis=0)
    ratio = np.maximum(spacings / median, median / spacings).max(axis=1)
    problems = []
    for fact, row, factor in zip(known, spacings, ratio, strict=True):
        if factor > _SPACING_FACTOR:
            text = f"{_mm(row)} mm, where the median case has {_mm(median)} mm"
            file = _case_file(fact.case, dataset)
            problems.append(
                Problem(fact.case.id, file, "spacing-outlier", text, "note")
            )
    return problems


def _mm(spacing: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing)


def _absent_labels(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Problem]:
    counts = [fact.label_counts for fact in facts if fact.label_counts is not None]
    if not counts:
        return []
    present = {value for count in counts for value in count}
    return [
        Problem("", "", "absent-label", f"no case holds {name} ({value})", "note")
        for name, value in dataset.labels.labels.items()
        if value not in present
    ]


def _unlabelled_among_labelled(dataset: Dataset) -> list[Problem]:
    """In BraTS folders, name cases whose neighbours have a label map and they don't."""
    if dataset.layout != "brats":
        return []
    labelled = {_key(case.images[0].parent.parent) for case in dataset.cases}
    problems = []
    for case in dataset.unlabelled:
        folder = case.images[0].parent
        if _key(folder.parent) in labelled:
            text = "no *seg.nii.gz, while cases beside it have one"
            file = shown(folder, dataset.root)
            problems.append(Problem(case.id, file, "missing-label", text))
    return problems
