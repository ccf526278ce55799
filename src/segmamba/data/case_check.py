"""Look at every file of one case, one at a time, and say what is wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from segmamba.data.dataset import Case, Dataset
from segmamba.data.layouts.label_values import count_values
from segmamba.errors import GeometryError, SegMambaError
from segmamba.io import Volume, describe_grid_difference, read_header, read_volume
from segmamba.io.formats import FakeFileError, TruncatedFileError
from segmamba.types import Array, Spacing3

Severity = Literal["error", "note"]

_MOST_NAMED = 5


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or worth knowing, about one file."""

    case: str
    """The case's id; empty if the file belongs to none."""
    file: str
    """The file, relative to the data set's root where it lies under it."""
    kind: str
    """What sort of problem, such as "shape-mismatch"."""
    message: str
    """What is wrong, with numbers."""
    severity: Severity = "error"
    """An error spoils training or scores; a note is for the reader to judge."""


@dataclass
class CaseFacts:
    """What one case contributes to the comparison of cases."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    spacing_mm: Spacing3 | None = None
    content: str | None = None
    """Hash of all image voxels; None if a file is unreadable or all are constant."""
    label_counts: dict[float, int] | None = None
    """Voxels of each label value; None without a readable label map."""


class CaseReader:
    """Checks the files of one case; memory holds one file at a time."""

    def __init__(self, dataset: Dataset, case: Case) -> None:
        self.dataset = dataset
        self.case = case
        self.facts = CaseFacts(case)
        self._first: Volume | None = None
        self._hashes: list[tuple[str, str]] = []  # of each channel: name and sum
        self._constant = True
        self._channels: int | None = 0

    def check(self) -> CaseFacts:
        """Check all files of the case.

        Returns:
            The problems, and what is needed to compare the case with others.
        """
        for path in self.case.images:
            self._check_image(path)
        self._check_channels()
        if self._channels is not None and not self._constant:
            joined = "".join(content for _, content in self._hashes)
            self.facts.content = hashlib.sha256(joined.encode()).hexdigest()
        if self.case.label is not None:
            self._check_label(self.case.label)
        return self.facts

    def _add(self, path: Path, kind: str, text: str, severity: Severity = "error"):
        name = shown(path, self.dataset.root)
        self.facts.problems.append(Problem(self.case.id, name, kind, text, severity))

    def _read(
        self, path: Path, missing: str, frame: int | None = None
    ) -> Volume | None:
        volume, kind, text = try_reading(path, missing, frame)
        if volume is None:
            self._add(path, kind, text)
            return None
        for note in read_header(path).notes:
            self._add(path, "header-contradiction", note, "note")
        return volume

    def _check_image(self, path: Path) -> None:
        volume = self._read(path, "missing-channel", self.case.frame)
        if volume is None:
            self._channels = None
            return
        for kind, text in image_problems(volume.array):
            self._add(path, kind, text)
        for index, channel in enumerate(volume.array):
            self._compare_channel(path, index, channel)
        if self._channels is not None:
            self._channels += volume.array.shape[0]
        self._compare_grid(path, volume)

    def _compare_channel(self, path: Path, index: int, channel: Array) -> None:
        if channel.min() == channel.max():
            return
        self._constant = False
        content = hash_voxels(channel)
        name = f"{path.name}, channel {index}" if index else path.name
        twin = next((other for other, sum_ in self._hashes if sum_ == content), None)
        if twin is not None:
            text = f"holds the same voxels as {twin}"
            self._add(path, "identical-channels", text, "note")
        self._hashes.append((name, content))

    def _compare_grid(self, path: Path, volume: Volume) -> None:
        if self._first is None:
            # Only shape and affine are kept: a view of one voxel stands for the rest.
            stand_in = np.broadcast_to(np.uint8(0), volume.array.shape)
            self._first = Volume(stand_in, volume.affine, path)
            self.facts.spacing_mm = volume.spacing_mm
            return
        first = self._first
        difference = describe_grid_difference(
            first.shape, first.affine, volume.shape, volume.affine
        )
        if difference is None:
            return
        kind = "affine-mismatch" if first.shape == volume.shape else "shape-mismatch"
        name = first.path.name if first.path else "the first image"
        self._add(path, kind, f"{difference}, compared with {name}")

    def _check_channels(self) -> None:
        expected = len(self.dataset.channels)
        if self._channels is not None and self._channels != expected:
            text = f"{self._channels} channels instead of {expected}"
            self._add(self.case.images[0], "channel-count", text)

    def _check_label(self, path: Path) -> None:
        volume = self._read(path, "missing-label")
        if volume is None:
            return
        if volume.array.shape[0] != 1:
            text = f"a label map with {volume.array.shape[0]} channels instead of 1"
            self._add(path, "channel-count", text)
            return
        self._compare_grid(path, volume)
        for kind, text, severity in float_label_problems(volume.array):
            self._add(path, kind, text, severity)
        counts = count_values(volume.array)
        self.facts.label_counts = counts
        known = self.dataset.labels.known_values
        wrong = {v: n for v, n in counts.items() if v == int(v) and int(v) not in known}
        if wrong:
            text = f"{_name_values(wrong)}; known are {_join(known)}"
            self._add(path, "unexpected-label", text)
        if not any(counts.get(value, 0) for value in known if value != 0):
            self._add(path, "empty-label", "holds background only", "note")


def check_case(dataset: Dataset, case: Case) -> CaseFacts:
    """Check all files of one case.

    Args:
        dataset: The data set, for its channels and labels.
        case: One of its cases.

    Returns:
        The problems, and what is needed to compare the case with others.
    """
    return CaseReader(dataset, case).check()


def try_reading(
    path: Path, missing: str, frame: int | None = None
) -> tuple[Volume | None, str, str]:
    """Read a file, or say why it can't be read.

    Args:
        path: The file.
        missing: The kind of problem if there is no such file.
        frame: Which of the fourth axis to read; None reads all.

    Returns:
        The volume, and two empty texts; or None, the kind of problem, and a sentence.
    """
    if not os.path.lexists(path):
        return None, missing, "no such file"
    try:
        return read_volume(path, frame=frame), "", ""
    except FakeFileError as error:
        kind, text = "fake-file", str(error)
    except TruncatedFileError as error:
        kind, text = "truncated", str(error)
    except GeometryError as error:
        kind, text = "bad-geometry", str(error)
    except (SegMambaError, OSError) as error:
        kind, text = "unreadable", str(error)
    except MemoryError:
        kind, text = "unreadable", "does not fit into memory"
    return None, kind, text.replace(f", in {path}", "").replace(f": in {path}", "")


def image_problems(array: Array) -> list[tuple[str, str]]:
    """Look for voxels that spoil an image.

    Args:
        array: (C, I, J, K).

    Returns:
        Kind and sentence of each problem: not-finite voxels, constant channels.
    """
    problems = []
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            nans = int(np.count_nonzero(np.isnan(array)))
            text = f"{nans} NaN and {bad - nans} infinite voxels of {array.size}"
            problems.append(("not-finite", text))
    for index, channel in enumerate(array):
        value = channel.flat[0]
        if channel.min() == channel.max() or not np.isfinite(channel).any():
            where = f"channel {index}" if len(array) > 1 else "every voxel"
            problems.append(("constant-image", f"{where} is {value}"))
    return problems


def float_label_problems(array: Array) -> list[tuple[str, str, Severity]]:
    """Look for labels that are no integers.

    Args:
        array: A label map of any shape.

    Returns:
        Kind, sentence and severity of each problem.
    """
    if array.dtype.kind != "f":
        return []
    finite = np.isfinite(array)
    bad = array.size - int(np.count_nonzero(finite))
    values = array[finite]
    broken = values[values != np.rint(values)]
    problems: list[tuple[str, str, Severity]] = []
    if bad:
        problems.append(("not-finite", f"{bad} NaN or infinite voxels", "error"))
    if broken.size:
        examples = _name_values(count_values(broken))
        problems.append(("float-label", f"fractions: {examples}", "error"))
    elif not bad:
        text = f"integers stored as {array.dtype}"
        problems.append(("float-label", text, "note"))
    return problems


def hash_voxels(array: Array) -> str:
    """Give a fingerprint of voxels, the same for the same shape, type and values.

    Args:
        array: (I, J, K).

    Returns:
        A hexadecimal text.
    """
    voxels = np.ascontiguousarray(array.transpose())  # no copy for what a file gives
    digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
    digest.update(voxels.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def shown(path: Path, root: Path) -> str:
    """Give a path as reports show it: relative to the root where it lies under it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _name_values(counts: dict[float, int]) -> str:
    named = [f"{v:g} in {n} voxels" for v, n in list(counts.items())[:_MOST_NAMED]]
    more = len(counts) - len(named)
    return _join(named) + (f" and {more} more values" if more else "")


def _join(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)
