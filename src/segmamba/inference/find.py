"""Which cases an input names: a scan, its channels, a folder, or a data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from segmamba.data.dataset import Case
from segmamba.data.layouts import load_dataset
from segmamba.errors import ConfigError, FormatError, SegMambaError, describe
from segmamba.inference.dicom_study import dicom_studies
from segmamba.io import (
    SCAN_SUFFIXES,
    DicomSeries,
    Volume,
    holds_dicom,
    is_scan,
    read_case,
    read_header,
    read_series,
    strip_suffix,
)

Which = Literal["all", "labelled", "unlabelled"]
"""Cases of a data set: all, those with a label map, or those without."""

_NUMBERED = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})$")
_SYNONYMS = (
    {"t1", "t1n", "t1w", "t1pre"},
    {"t1c", "t1ce", "t1gd", "t1post"},
    {"t2", "t2w"},
    {"flair", "t2f", "t2flair"},
)
_LABELS = {"seg", "label", "labels", "mask", "gt"}


@dataclass(frozen=True)
class InputCase:
    """A case to predict, or why it can't be."""

    id: str
    """Stem of what is written for it."""
    images: tuple[Path, ...]
    """One file per channel in the model's order, or one file with all channels."""
    problem: str | None = None
    """What is wrong with its files, found before anything is read."""
    series: tuple[DicomSeries, ...] = ()
    """For DICOM: one series per channel in the model's order; `images` is then the
    folder or archive that holds them."""
    frame: int | None = None
    """Which of the images' fourth axis is the case, from 0; None makes it channels."""

    def scan(self) -> Volume | tuple[Path, ...]:
        """Give what a predictor takes: a volume of series or of a frame, or files."""
        if self.frame is not None:
            return read_case(self.images, frame=self.frame)
        return read_series(self.series) if self.series else self.images


def find_cases(
    source: str | Path | Sequence[str | Path],
    channels: Sequence[str],
    *,
    which: Which = "all",
    series: Sequence[str] | None = None,
    frames: bool = False,
) -> list[InputCase]:
    """List the cases that an input names.

    A sequence of files is the channels of one scan; for a model of one channel, each
    is a scan. A folder is, in this order: a data
    set with a dataset.json; a folder of scans, grouped by nnU-Net's endings
    (case_0000.nii.gz, case_0001.nii.gz) or by endings that name the channels
    (case_t1ce.nii.gz, case-t1c.nii.gz), else each file is a case; a folder of case
    folders, each with the files of one scan, as in BraTS; any other data set that
    `data.layouts.load_dataset` knows. A CSV file is a data set. Label maps beside the
    images (case_seg.nii.gz) and contrasts that the model doesn't use are left aside.
    A folder without any of these, a zip or tar, or a multi-frame file may hold DICOM:
    each study is a case, its series are chosen by `series` or by their descriptions.

    Args:
        source: A scan, the channels of one, a folder, or a data set.
        channels: The model's channel names in order.
        which: Of a data set: all its cases, or only those with or without a label map.
        series: Of DICOM: number, description or UID of each channel's series.
        frames: Take each frame of 4D files as a case of its own, CASE_frame_0 and so
            on, instead of the fourth axis as channels.

    Returns:
        Cases sorted by id. A case that lacks a channel carries a `problem`.

    Raises:
        FormatError: Nothing is there, or no scan is found; a single scan lacks a
            channel.
        ConfigError: A data set's channels differ in number from the model's, or it
            isn't clear which DICOM series to take.
        BackendUnavailableError: It is DICOM, and no library is there to read it.
    """
    if frames:
        found = find_cases(source, channels, which=which, series=series)
        return [frame for case in found for frame in _frames(case)]
    if not isinstance(source, (str, Path)):
        return _from_files([Path(path) for path in source], channels, which, series)
    path = Path(source)
    if series:
        cases = _from_dicom(path, channels, series)
    elif path.is_dir():
        cases = _from_folder(path, channels, which)
    elif not path.exists():
        raise FormatError(describe("there is no such scan or folder", file=path))
    elif path.suffix.lower() in (".csv", ".json"):
        cases = _from_dataset(path, channels, which)
    elif not is_scan(path) and holds_dicom(path):
        cases = _from_dicom(path, channels, None)
    else:
        cases = [_single(path, channels)]
    if not cases:
        raise FormatError(_nothing(path, channels))
    return sorted(cases, key=lambda case: case.id)


def _frames(case: InputCase) -> list[InputCase]:
    """Part a case of 4D files into its frames; a broken one is reported when read."""
    if case.problem is not None or case.series or case.frame is not None:
        return [case]
    try:
        count = read_header(case.images[0]).channels
    except SegMambaError:
        return [case]
    digits = len(str(count - 1))
    return [
        replace(case, id=f"{case.id}_frame_{frame:0{digits}}", frame=frame)
        for frame in range(count)
    ]


def _from_files(
    files: list[Path],
    channels: Sequence[str],
    which: Which,
    series: Sequence[str] | None,
) -> list[InputCase]:
    if not files:
        raise FormatError(describe("no scan is given", expected="a file or a folder"))
    if len(files) == 1:
        return find_cases(files[0], channels, which=which, series=series)
    if series:
        raise ConfigError(
            describe(
                "series can be chosen from one DICOM folder or archive only",
                found=f"{len(files)} inputs",
            )
        )
    if len(channels) == 1:
        cases = [_single(file, channels) for file in files]
        return sorted(cases, key=lambda case: case.id)
    if len(files) != len(channels):
        raise ConfigError(
            describe(
                "the files don't fit the model's channels",
                expected=f"{len(channels)} ({', '.join(channels)}, in this order)",
                found=f"{len(files)} files",
                remedy="Give all channels of one scan, or a folder.",
            )
        )
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FormatError(describe("there is no such scan", file=missing))
    stem = strip_suffix(files[0])
    numbered, named = _NUMBERED.match(stem), _split_channel(stem, channels)
    case = numbered["case"] if numbered else named[0] if named else stem
    return [InputCase(case, tuple(files))]


def _single(path: Path, channels: Sequence[str]) -> InputCase:
    """Take a file as a case, with the other channels if its name has a number."""
    if not path.is_file() or not is_scan(path):
        raise FormatError(
            describe(
                "not a scan",
                expected=f"a file ending in {', '.join(SCAN_SUFFIXES)}, or a folder",
                file=path,
            )
        )
    numbered = _NUMBERED.match(strip_suffix(path))
    named = _split_channel(strip_suffix(path), channels)
    if len(channels) == 1 or not (numbered or named):
        case = numbered["case"] if numbered and numbered["channel"] == "0000" else None
        return InputCase(case or strip_suffix(path), (path,))
    groups = _group(_scans(path.parent), channels)
    case_id = numbered["case"] if numbered else named[0] if named else ""
    case = _complete(case_id, groups.get(case_id, {}), channels, path.parent)
    if case.problem is not None:
        raise FormatError(case.problem)
    return case


def _from_folder(
    folder: Path, channels: Sequence[str], which: Which
) -> list[InputCase]:
    if (folder / "dataset.json").is_file():
        return _from_dataset(folder, channels, which)
    scans = _scans(folder)
    if scans:
        return _from_scans(scans, channels, folder)
    children = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [case for path in children for case in _from_case_folder(path, channels)]
    if found and which == "all":
        return found
    if holds_dicom(folder):
        return _from_dicom(folder, channels, None)
    try:  # deeper folders (HGG, LGG), a table, or only the cases with a label map
        return _from_dataset(folder, channels, which)
    except FormatError:
        if which != "all":
            raise
        return []


def _from_dataset(path: Path, channels: Sequence[str], which: Which) -> list[InputCase]:
    dataset = load_dataset(path)
    if len(dataset.channels) != len(channels):
        raise ConfigError(
            describe(
                "the data set's channels don't fit the model's",
                expected=", ".join(channels),
                found=", ".join(dataset.channels),
                file=path,
            )
        )
    groups: dict[Which, tuple[Case, ...]] = {
        "all": (*dataset.cases, *dataset.unlabelled),
        "labelled": dataset.cases,
        "unlabelled": dataset.unlabelled,
    }
    return [InputCase(case.id, case.images, frame=case.frame) for case in groups[which]]


def _from_dicom(
    source: Path, channels: Sequence[str], choices: Sequence[str] | None
) -> list[InputCase]:
    names = {channel: _names_of(channel) for channel in channels}
    return [
        InputCase(study.id, (source,), study.problem, study.series)
        for study in dicom_studies(source, names, choices)
    ]


def _from_scans(
    scans: list[Path], channels: Sequence[str], folder: Path
) -> list[InputCase]:
    groups = _group(scans, channels)
    if groups:
        cases = [_complete(*item, channels, folder) for item in groups.items()]
        used = {path for group in groups.values() for path in group.values()}
        rest = [path for path in scans if path not in used and not _is_label(path)]
        # A contrast that the model doesn't use is no case of its own; but case_10 is
        # none of case_1.
        ids = tuple(case + sign for case in groups for sign in "-_.")
        rest = [path for path in rest if not f"{strip_suffix(path)}_".startswith(ids)]
        return cases + [_ungrouped(path, channels) for path in rest]
    return [InputCase(strip_suffix(path), (path,)) for path in scans]


def _from_case_folder(folder: Path, channels: Sequence[str]) -> list[InputCase]:
    scans = [path for path in _scans(folder) if not _is_label(path)]
    if len(scans) == 1:  # one channel, or one file that holds all
        return [InputCase(folder.name, (scans[0],))]
    if scans and not _group(scans, channels):
        return [InputCase(folder.name, tuple(scans), _unnamed(folder, scans, channels))]
    cases = _from_scans(scans, channels, folder)
    if len(cases) == 1:
        return [InputCase(folder.name, cases[0].images, cases[0].problem)]
    return [
        InputCase(f"{folder.name}_{case.id}", case.images, case.problem)
        for case in cases
    ]


def _unnamed(folder: Path, scans: list[Path], channels: Sequence[str]) -> str:
    names = ", ".join(path.name for path in scans[:4])
    return describe(
        f"case folder {folder.name} holds several scans of unknown channels",
        expected=f"one scan, or names that end with {', '.join(channels)}",
        found=names + (f" and {len(scans) - 4} more" if len(scans) > 4 else ""),
        file=folder,
        remedy="If each is a case, give this folder itself.",
    )


def _ungrouped(path: Path, channels: Sequence[str]) -> InputCase:
    problem = describe(
        "a file's name ends with none of the model's channels",
        expected=f"{', '.join(channels)}, or _0000 to _{len(channels) - 1:04d}",
        file=path,
    )
    return InputCase(strip_suffix(path), (path,), problem)


def _group(scans: list[Path], channels: Sequence[str]) -> dict[str, dict[int, Path]]:
    """Group files into cases by what their names end with; {} if names have no system.

    Endings of four digits may be case numbers where there is one channel (scan_0001,
    scan_0002); there they count as channels only if all of them are 0000.
    """
    stems = {path: strip_suffix(path) for path in scans}
    images = {path: stem for path, stem in stems.items() if not _is_label(path)}
    numbered = {path: _NUMBERED.match(stem) for path, stem in images.items()}
    indices = {int(match["channel"]) for match in numbered.values() if match}
    groups: dict[str, dict[int, Path]] = {}
    if indices and (len(channels) > 1 or indices == {0}):
        for path, match in numbered.items():
            if match:
                groups.setdefault(match["case"], {})[int(match["channel"])] = path
        return groups
    for path, stem in images.items():
        named = _split_channel(stem, channels)
        if named is not None:
            groups.setdefault(named[0], {})[named[1]] = path
    return groups


def _complete(
    case: str, files: dict[int, Path], channels: Sequence[str], folder: Path
) -> InputCase:
    missing = [name for i, name in enumerate(channels) if i not in files]
    surplus = [path.name for i, path in files.items() if i >= len(channels)]
    images = tuple(files[i] for i in sorted(files))
    if not missing and not surplus:
        return InputCase(case, images)
    problem = describe(
        f"case {case} " + ("lacks a channel" if missing else "has too many channels"),
        expected=", ".join(channels),
        found=f"no {', '.join(missing)}" if missing else ", ".join(surplus),
        file=folder,
    )
    return InputCase(case, images, problem)


def _split_channel(stem: str, channels: Sequence[str]) -> tuple[str, int] | None:
    """Split "BraTS-GLI-00001-000-t1c" into the case and the channel's index."""
    match = re.fullmatch(r"(.+)[-_.]([^-_.]+)", stem)
    if match is None:
        return None
    for index, channel in enumerate(channels):
        if match[2].lower() in _names_of(channel):
            return match[1], index
    # A channel's own name may hold the separator, such as "dwi_b0".
    for index, channel in enumerate(channels):
        whole = re.fullmatch(rf"(.+)[-_.]{re.escape(channel)}", stem, re.IGNORECASE)
        if whole is not None:
            return whole[1], index
    return None


def _names_of(channel: str) -> set[str]:
    plain = channel.lower()
    return next((group for group in _SYNONYMS if plain in group), {plain})


def _is_label(path: Path) -> bool:
    return re.split(r"[-_.]", strip_suffix(path).lower())[-1] in _LABELS


def _scans(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir())
    # A link to nowhere is a file that was never fetched: reading it will say so.
    return [p for p in files if is_scan(p) and (p.is_file() or p.is_symlink())]


def _nothing(path: Path, channels: Sequence[str]) -> str:
    return describe(
        "no scan found",
        expected=f"files ending in {', '.join(SCAN_SUFFIXES)}, in the folder itself "
        f"or in case folders, for the channels {', '.join(channels)}",
        file=path,
    )
