"""Studies of DICOM as cases: which series is which channel; label maps as DICOM-SEG."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, SegMambaError, describe
from segmamba.io import (
    DicomSeries,
    choose_series,
    list_series,
    make_segments,
    write_dicom_rtstruct,
    write_dicom_seg,
)
from segmamba.io.dicom import check_one_grid, list_text
from segmamba.io.dicom_files import strip_archive_suffix
from segmamba.io.dicom_seg import SegType, check_can_write
from segmamba.types import Array, JsonDict

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DicomStudy:
    """One study as a case."""

    id: str
    """Stem of what is written for it."""
    series: tuple[DicomSeries, ...]
    """One per channel; none if there is a problem."""
    problem: str | None = None
    """Why it can't be predicted."""


@dataclass(frozen=True)
class SegOutput:
    """How to write label maps as DICOM."""

    kind: SegType | Literal["RTSTRUCT"] = "BINARY"
    """DICOM-SEG: "BINARY", or "LABELMAP" (smaller, but unknown to older viewers); or
    "RTSTRUCT", contours."""
    described: Mapping[str, JsonDict] = field(default_factory=dict)
    """Codes and colours of labels, as `io.dicom_segments.make_segments` takes them."""

    def check(self, scheme: LabelScheme) -> None:
        """Find out before anything is computed what can't be written.

        Raises:
            BackendUnavailableError: highdicom isn't installed.
            ConfigError: A description fits no label, or is malformed.
        """
        if self.kind != "RTSTRUCT":
            check_can_write()
        make_segments(named_values(scheme), self.described)

    def write(
        self, path: Path, label_map: Array, series: DicomSeries, scheme: LabelScheme
    ) -> None:
        """Write a label map, atomically.

        Args:
            path: The file, such as case.dcm.
            label_map: (I, J, K), on the grid of `series`.
            series: What was segmented, or its first channel.
            scheme: What the integers mean.

        Raises:
            FormatError: The headers lack something, or the file can't be written.
        """
        segments = make_segments(named_values(scheme), self.described)
        if self.kind == "RTSTRUCT":
            write_dicom_rtstruct(path, label_map, series, segments)
        else:
            write_dicom_seg(path, label_map, series, segments, kind=self.kind)


def named_values(scheme: LabelScheme) -> dict[str, int]:
    """Name every integer that a label map may hold, by its label, else its region."""
    named = dict(scheme.labels)
    for name, value in zip(scheme.regions, scheme.regions_order, strict=True):
        if value not in named.values():
            named[name if name not in named else f"{name} {value}"] = value
    return named


def dicom_studies(
    source: Path,
    channels: Mapping[str, AbstractSet[str]],
    choices: Sequence[str] | None = None,
) -> list[DicomStudy]:
    """List the studies of a folder or archive, with the series of each channel.

    Args:
        source: A folder, an archive or a multi-frame file.
        channels: The model's channels in order, each with the words in a description
            that mean it, in small letters.
        choices: Number, description or UID of each channel's series; None goes by the
            descriptions, unless there is one channel and one series.

    Returns:
        One for each study. Where there are several, one that lacks a channel carries a
        `problem`.

    Raises:
        FormatError: There is no DICOM series, or a file is damaged.
        ConfigError: The only study lacks a channel, or it isn't clear which to take.
        GeometryError: Its series lie on different grids.
        BackendUnavailableError: pydicom isn't installed.
    """
    groups: dict[str, list[DicomSeries]] = {}
    for series in list_series(source):
        groups.setdefault(series.study, []).append(series)
    if len(groups) == 1:
        (found,) = groups.values()
        return [DicomStudy(_plain(source), _channels(found, channels, choices))]
    names = _study_names(source, groups)
    return [
        _one_of_many(name, found, channels, choices)
        for name, found in zip(names, groups.values(), strict=True)
    ]


def _one_of_many(
    name: str,
    found: list[DicomSeries],
    channels: Mapping[str, AbstractSet[str]],
    choices: Sequence[str] | None,
) -> DicomStudy:
    try:
        return DicomStudy(name, _channels(found, channels, choices))
    except SegMambaError as error:  # the other studies must not suffer from it
        return DicomStudy(name, (), str(error))


def _study_names(source: Path, groups: Mapping[str, list[DicomSeries]]) -> list[str]:
    """Call studies as the folders that hold them, else by their UIDs' ends.

    Folders that hold all studies are left out, and no more are named than tell the
    studies apart.
    """
    whole = {
        uid: _common([file.folder for series in found for file in series.files])
        for uid, found in groups.items()
    }
    shared = len(_common(list(whole.values())))
    own = {uid: folders[shared:] for uid, folders in whole.items()}
    names: list[str] = []
    for depth in range(1, 1 + max(1, *map(len, own.values()))):
        names = [
            _sanitized("_".join(folders[:depth]) or f"{_plain(source)}_{_end(uid)}")
            for uid, folders in own.items()
        ]
        if len({name.casefold() for name in names}) == len(names):
            break
    return names


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Give the folders that begin all paths."""
    levels = zip(*paths, strict=False)
    same = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return tuple(names[0] for names in same)


def _end(uid: str) -> str:
    return uid.split(".")[-1]


def _plain(source: Path) -> str:
    return _sanitized(strip_archive_suffix(source))


def _sanitized(name: str) -> str:
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]|^\.', "_", name) or "scan"


def _channels(
    found: list[DicomSeries],
    channels: Mapping[str, AbstractSet[str]],
    choices: Sequence[str] | None,
) -> tuple[DicomSeries, ...]:
    if choices:
        if len(choices) != len(channels):
            raise ConfigError(
                describe(
                    "the series don't fit the model's channels",
                    expected=f"{len(channels)} ({', '.join(channels)}, in this order)",
                    found=", ".join(choices),
                )
            )
        chosen = [choose_series(found, choice) for choice in choices]
    elif len(found) == len(channels) == 1:
        chosen = found
    else:
        chosen = _by_description(found, channels)
    check_one_grid(chosen)
    return tuple(chosen)


def _by_description(
    found: list[DicomSeries], channels: Mapping[str, AbstractSet[str]]
) -> list[DicomSeries]:
    fitting = {
        name: [item for item in found if _means(item.description, words)]
        for name, words in _all_words(channels).items()
    }
    unclear = [name for name, items in fitting.items() if len(items) != 1]
    chosen = [items[0] for items in fitting.values() if items]
    if unclear or len({item.uid for item in chosen}) < len(channels):
        raise ConfigError(
            describe(
                "it is not clear which series to take",
                expected=f"one for each of {', '.join(channels)}, named so",
                found=list_text(found),
                file=found[0].source,
                remedy="Choose with --series, by number, description or UID, one for "
                "each channel in this order.",
            )
        )
    for name, item in zip(channels, chosen, strict=True):
        _log.warning("%s is taken from %s, by its description", name, item.name)
    return chosen


def _all_words(
    channels: Mapping[str, AbstractSet[str]],
) -> dict[str, tuple[AbstractSet[str], AbstractSet[str]]]:
    """Give each channel's own words, and those of all channels together."""
    every = {word for words in channels.values() for word in words}
    return {name: (words, every) for name, words in channels.items()}


def _means(description: str, words: tuple[AbstractSet[str], AbstractSet[str]]) -> bool:
    """Tell whether a description names a channel.

    Two words together say more than each alone: "T2 FLAIR" is no T2, "T1 post" no T1.
    """
    own, every = words
    parts = re.findall(r"[a-z0-9]+", description.lower())
    pairs = [first + second for first, second in itertools.pairwise(parts)]
    told = [pair for pair in pairs if pair in every] or parts
    return any(word in own for word in told)
