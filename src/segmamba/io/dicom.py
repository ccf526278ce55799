"""DICOM series to volumes: list what is there, choose, read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segmamba.errors import ConfigError, FormatError, GeometryError, describe
from segmamba.io.dicom_files import DicomFile, iterate_files
from segmamba.io.dicom_grid import arrange, missing_at_ends
from segmamba.io.dicom_headers import (
    INSTALL,
    Header,
    Slice,
    pydicom_module,
    read_header,
)
from segmamba.io.dicom_voxels import read_voxels
from segmamba.io.geometry import describe_grid_difference
from segmamba.io.volume import Volume
from segmamba.types import Array, FloatArray, Size3

_log = logging.getLogger(__name__)

__all__ = [
    "INSTALL",
    "DicomSeries",
    "choose_series",
    "list_series",
    "read_dicom",
    "read_series",
]


@dataclass(frozen=True)
class DicomSeries:
    """One series, by its headers; its grid is worked out when it is first asked for."""

    source: Path
    """The folder, archive or file that it was found in."""
    headers: tuple[Header, ...]
    """One for each file."""

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return self.headers[0].uid

    @property
    def study(self) -> str:
        """StudyInstanceUID."""
        return self.headers[0].study

    @property
    def number(self) -> int | None:
        """SeriesNumber, if the files have one."""
        return self.headers[0].number

    @property
    def description(self) -> str:
        """SeriesDescription, or an empty text."""
        return self.headers[0].description

    @property
    def files(self) -> tuple[DicomFile, ...]:
        """Its files, in the order in which they were found."""
        return tuple(header.slices[0].file for header in self.headers)

    @property
    def name(self) -> str:
        """What error texts call it."""
        number = "" if self.number is None else f" {self.number}"
        title = f" ({self.description})" if self.description else ""
        return f"series{number}{title}" if number or title else f"series {self.uid}"

    @property
    def summary(self) -> str:
        """Number, description, modality and size in one line."""
        count = sum(len(header.slices) for header in self.headers)
        rows, columns = self.headers[0].slices[0].size
        number = "-" if self.number is None else self.number
        what = f"{self.description or '(no description)'}, {self.headers[0].modality}"
        return f"{number}: {what}, {columns} x {rows} x {count}, UID {self.uid}"

    @cached_property
    def grid(self) -> tuple[tuple[Slice, ...], FloatArray]:
        """The slices in order and the affine.

        Raises:
            GeometryError: The slices don't form one grid.
            FormatError: The voxels are no intensities.
        """
        problem = next((head.problem for head in self.headers if head.problem), None)
        if problem is not None:
            raise FormatError(problem)
        slices = [item for header in self.headers for item in header.slices]
        return arrange(slices, self.headers[0].thickness, self.name)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices in order, along the normal."""
        return self.grid[0]

    @property
    def affine(self) -> FloatArray:
        """(4, 4): index of column, row and slice to RAS+ mm."""
        return self.grid[1]

    @property
    def shape(self) -> Size3:
        """Voxels along I (columns), J (rows), K (slices)."""
        rows, columns = self.slices[0].size
        return columns, rows, len(self.slices)


def list_series(source: Path | str) -> list[DicomSeries]:
    """List the image series of a folder, an archive or a multi-frame file.

    Only headers are kept; nothing is unpacked to disk. Reports, segmentations and
    other files that are no scans are left out.

    Args:
        source: A folder (and those below it), a zip or tar, or a DICOM file.

    Returns:
        The series by number, then description and UID.

    Raises:
        FormatError: There is no series, or a file is damaged.
        BackendUnavailableError: pydicom isn't installed.
    """
    source = Path(source)
    pydicom_module()
    groups: dict[str, list[Header]] = {}
    for file, stream in iterate_files(source):
        header = read_header(file, stream)
        if header is not None:
            groups.setdefault(header.uid, []).append(header)
    found = [DicomSeries(source, tuple(group)) for group in groups.values()]
    if not found:
        raise FormatError(
            describe("no DICOM series found", expected="DICOM images", file=source)
        )
    _refuse_lone_slice(found, source)
    return sorted(
        found,
        key=lambda series: (
            series.number is None,
            series.number or 0,
            series.description,
            series.uid,
        ),
    )


def choose_series(found: Sequence[DicomSeries], choice: str) -> DicomSeries:
    """Choose a series by number, description or UID.

    Args:
        found: What there is.
        choice: SeriesNumber; SeriesInstanceUID or its end; or the description, in any
            case, whole or, unless it is a number, in part.

    Returns:
        The series.

    Raises:
        ConfigError: None or several fit; the text lists what there is.
    """
    wanted = choice.strip().lower()
    is_number = wanted.isdigit()  # of a series, and no part of "T1"
    rules = (
        lambda series: series.uid == wanted,
        lambda series: str(series.number) == wanted,
        lambda series: series.description.lower() == wanted,
        lambda series: not is_number and wanted in series.description.lower(),
        lambda series: len(wanted) > 3 and series.uid.endswith(wanted),
    )
    for rule in rules:
        fitting = [series for series in found if rule(series)] if wanted else []
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ConfigError(_no_choice(f"{choice!r} fits several series", fitting))
    raise ConfigError(_no_choice(f"no series fits {choice!r}", found))


def list_text(found: Sequence[DicomSeries]) -> str:
    """Give series in one text, for errors."""
    return "; ".join(series.summary for series in found)


def read_dicom(
    source: Path | str,
    series: str | Sequence[str] | None = None,
    *,
    dtype: npt.DTypeLike = np.float32,
) -> Volume:
    """Read one series, or several on one grid as channels.

    Args:
        source: A folder, a zip or tar, or a multi-frame file.
        series: Number, description or UID; several make the channels, in this order.
            None takes the only series that there is.
        dtype: Number type of the result.

    Returns:
        The volume (C, I, J, K): columns, rows, slices; slope and intercept applied.

    Raises:
        FormatError: A file is damaged, or there is no series.
        ConfigError: There are several series and none is chosen, or a choice is not
            clear.
        GeometryError: Slices don't form a grid, or series lie on different ones.
        BackendUnavailableError: pydicom or a decoder isn't installed.
    """
    found = list_series(source)
    if series is None:
        if len(found) > 1:
            raise ConfigError(_no_choice("there are several series", found))
        return read_series(found, dtype=dtype)
    choices = [series] if isinstance(series, str) else list(series)
    return read_series([choose_series(found, item) for item in choices], dtype=dtype)


def read_series(
    series: Sequence[DicomSeries], *, dtype: npt.DTypeLike = np.float32
) -> Volume:
    """Read series as the channels of one volume.

    Args:
        series: One or more, of one patient and on one grid.
        dtype: Number type of the result.

    Returns:
        The volume (C, I, J, K), the grid of the first series.

    Raises:
        FormatError: A file is damaged, or the series are of several patients.
        GeometryError: Slices don't form a grid, or series lie on different ones.
        BackendUnavailableError: pydicom or a decoder isn't installed.
    """
    check_one_grid(series)
    first = series[0]
    # Columns lie densest, as in the files: no transposed copying.
    array: Array | None = None
    for channel, item in enumerate(series):
        lacking = missing_at_ends(item.slices, item.headers[0].acquired)
        if lacking is not None:
            _log.warning("%s may lack slices at an end: %s", item.name, lacking)
        voxels = read_voxels(item.headers, item.slices, np.dtype(dtype))
        if len(series) == 1:
            array = voxels[None]
        else:
            if array is None:
                array = np.empty((len(series), *voxels.shape), dtype)
            array[channel] = voxels
    assert array is not None
    return Volume(array.transpose(0, 3, 2, 1), first.affine, first.source)


def check_one_grid(series: Sequence[DicomSeries]) -> None:
    """Refuse channels of several patients, frames of reference or grids.

    Raises:
        FormatError: The patients differ.
        GeometryError: The slices of one don't form a grid; the grids, or what their
            positions refer to, differ.
    """
    first = series[0]
    _ = first.grid  # a series alone must form one, too
    for other in series[1:]:
        if other.headers[0].patient != first.headers[0].patient:
            raise FormatError(
                describe(
                    "series of different patients can't be channels of one scan",
                    expected=f"the patient of {first.name}",
                    found=f"another in {other.name}",
                    file=other.source,
                )
            )
        difference = describe_grid_difference(
            first.shape, first.affine, other.shape, other.affine
        )
        if other.headers[0].reference != first.headers[0].reference:
            difference = "another frame of reference"
        if difference is not None:
            raise GeometryError(
                describe(
                    "two series of a case lie on different grids",
                    expected=f"the grid of {first.name}",
                    found=f"{difference} in {other.name}",
                    file=other.source,
                    remedy="Register and resample one onto the other first.",
                )
            )


def _refuse_lone_slice(found: Sequence[DicomSeries], source: Path) -> None:
    only = [item for series in found for head in series.headers for item in head.slices]
    if source.is_file() and len(only) == 1 and only[0].file.member is None:
        raise FormatError(
            describe(
                "one slice is not a scan",
                expected="a series",
                found="a DICOM file of one slice",
                file=source,
                remedy="Give the folder with all slices of the series.",
            )
        )


def _no_choice(problem: str, found: Sequence[DicomSeries]) -> str:
    return describe(
        problem,
        expected="one of: " + list_text(found),
        file=found[0].source,
        remedy="Choose with --series, by number, description or UID.",
    )
