"""DICOM series that are no grid, and archives that are not safe to read."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dicom_series as make
import numpy as np
from bad_input import BadInput, write
from pydicom.dataset import Dataset

from segmamba.io import dicom_files, read_dicom

Group = list[Dataset]


def uid(number: int) -> str:
    return f"1.2.3.{number}"


def sound(number: int = 3, **tags: Any) -> Group:
    """A series with the same UIDs each time."""
    group = make.datasets(number=number, StudyInstanceUID=uid(1), **tags)
    for data in group:
        data.SeriesInstanceUID, data.FrameOfReferenceUID = uid(number), uid(2)
        # drawn ones have no fixed length, and errors speak of sizes
        data.SOPInstanceUID = uid(100 * number + data.InstanceNumber)
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return group


def series(*groups: Group) -> Callable[[Path], Path]:
    """Write series into folders a, b, c; slices are named by their order."""

    def made(folder: Path) -> Path:
        for name, group in zip("abc", groups, strict=False):
            (folder / "study" / name).mkdir(parents=True)
            for index, data in enumerate(group):
                path = folder / "study" / name / f"{index}.dcm"
                data.save_as(path, enforce_file_format=True)
        return folder / "study"

    return made


def spoiled(change: Callable[[Group], object]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        group = sound()
        change(group)
        return series(group)(folder)

    return made


def moved(*steps: tuple[int, Sequence[float]]) -> Callable[[Group], None]:
    """Shift slices by mm along the axes of the patient."""

    def change(group: Group) -> None:
        for index, step in steps:
            place = np.array(group[index].ImagePositionPatient, np.float64)
            make.place(group[index], place + np.asarray(step))

    return change


def tagged(index: int | None = None, **tags: Any) -> Callable[[Group], None]:
    """Set tags of one slice, or of all."""

    def change(group: Group) -> None:
        for data in group if index is None else [group[index]]:
            for tag, value in tags.items():
                setattr(data, tag, value)

    return change


def twice(group: Group) -> None:
    make.place(group[3], np.array(group[2].ImagePositionPatient, np.float64))


def unplaced(group: Group) -> None:
    del group[0].ImagePositionPatient


def no_pixels(group: Group) -> None:
    group[1].PixelData = group[1].PixelData[:-10]


TILT = moved(*((k, (0, 0.5 * k, 0)) for k in range(5)))
UNEVEN = moved((2, 0.6 * make.NORMAL))
COLOURS = {
    "SamplesPerPixel": 3,
    "PhotometricInterpretation": "RGB",
    "PlanarConfiguration": 0,
}


def lone(folder: Path) -> Path:
    return next(series(sound())(folder).rglob("2.dcm"))


def empty(folder: Path) -> Path:
    (folder / "study").mkdir()
    return folder / "study"


DICOM = (
    *tuple(
        BadInput(f"DICOM: {what}", made, read_dicom)
        for what, made in (
            ("no such folder", lambda folder: folder / "study"),
            ("a folder without DICOM", empty),
            ("one file of a series", lone),
            ("a slice is missing", spoiled(lambda group: group.pop(2))),
            ("two slices at one place", spoiled(twice)),
            ("a tilted gantry", spoiled(TILT)),
            ("a slice that is shifted", spoiled(moved((2, 2 * make.ROW)))),
            ("uneven steps", spoiled(UNEVEN)),
            (
                "mixed orientations",
                spoiled(tagged(1, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])),
            ),
            ("slices of different sizes", spoiled(tagged(4, Rows=3, Columns=8))),
            ("different pixel spacings", spoiled(tagged(4, PixelSpacing=[1.5, 0.8]))),
            ("a negative pixel spacing", spoiled(tagged(PixelSpacing=[1.5, -0.75]))),
            ("slices without a place", spoiled(unplaced)),
            (
                "a header that claims gigabytes",
                spoiled(tagged(Rows=65535, Columns=65535)),
            ),
            ("colours", spoiled(tagged(**COLOURS))),
            ("several series, none chosen", series(sound(3), sound(4))),
        )
    ),
    BadInput("DICOM: voxels that are cut off", spoiled(no_pixels), read_dicom, True),
    BadInput(
        "DICOM: no such series", series(sound(3)), lambda path: read_dicom(path, "12")
    ),
    BadInput(
        "DICOM: channels of two patients",
        series(sound(3), sound(4, PatientID="2")),
        lambda path: read_dicom(path, ["3", "4"]),
    ),
    BadInput(
        "DICOM: channels on different grids",
        series(sound(3), sound(4, PixelSpacing=[1.5, 0.8])),
        lambda path: read_dicom(path, ["3", "4"]),
    ),
)


def entry(
    kind: bytes = tarfile.REGTYPE, name: str = "scan.dcm"
) -> Callable[[Path], Path]:
    """A tar of one entry."""
    info, stream = tarfile.TarInfo(name), io.BytesIO()
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(info)
    return write("study.tar", stream.getvalue())


def zipped(
    name: str, data: bytes, *, attributes: int = 0, flags: int = 0
) -> Callable[[Path], Path]:
    """A zip of one entry."""
    info, stream = zipfile.ZipInfo(name), io.BytesIO()
    info.external_attr, info.compress_type = attributes << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(info, data)
    made = bytearray(stream.getvalue())
    if flags:  # in both headers of the entry
        made[6] |= flags
        made[made.index(b"PK\1\2") + 8] |= flags
    return write("study.zip", bytes(made))


def bounded(path: Path) -> None:
    """Read with a limit of a megabyte: to break the real one takes too long."""
    most = dicom_files.MAX_ARCHIVE_BYTES
    dicom_files.MAX_ARCHIVE_BYTES = 1 << 20
    try:
        read_dicom(path)
    finally:
        dicom_files.MAX_ARCHIVE_BYTES = most


HEAD = bytes(128) + b"DICM"

ARCHIVES = (
    *tuple(
        BadInput(f"archive: {what}", made, read_dicom, foreign)
        for what, made, foreign in (
            ("a name that leads out of it", zipped("../../evil.dcm", HEAD), False),
            ("an absolute name", entry(name="/etc/cron.d/evil"), False),
            ("a symbolic link (tar)", entry(tarfile.SYMTYPE), False),
            ("a hard link (tar)", entry(tarfile.LNKTYPE), False),
            ("a device (tar)", entry(tarfile.CHRTYPE), False),
            (
                "a symbolic link (zip)",
                zipped("a", b"/etc/passwd", attributes=41471),
                False,
            ),
            ("a password", zipped("a.dcm", HEAD, flags=1), True),
            ("it is none", write("study.zip", "no archive"), True),
            ("without DICOM", zipped("a.txt", b"text" * 99), False),
        )
    ),
    BadInput(
        "archive: a bomb (the limit is 16 GiB, here 1 MiB)",
        zipped("a.dcm", HEAD + bytes(2 << 20)),
        bounded,
    ),
)
