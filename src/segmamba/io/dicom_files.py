"""Find DICOM files in folders and archives; nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from segmamba.errors import FormatError, describe

ARCHIVE_SUFFIXES: tuple[str, ...] = (
    *(".zip", ".tar", ".tar.gz", ".tgz"),
    *(".tar.xz", ".txz", ".tar.bz2", ".tbz2"),
)
"""Endings of the archives that can be read."""

MAX_FILE_BYTES = 2 << 30
"""Most bytes of one file of an archive, unpacked."""
MAX_ARCHIVE_BYTES = 16 << 30
"""Most bytes of an archive, unpacked."""
MAX_ARCHIVE_FILES = 200_000
"""Most entries of an archive."""

_MAGIC_AT = 128
_MAGIC = b"DICM"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DicomFile:
    """A DICOM file, on its own or in an archive."""

    path: Path
    """The file, or the archive that holds it."""
    member: str | None = None
    """Its name in the archive."""
    size: int = 0
    """Bytes."""

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def name(self) -> str:
        """Its name without folders."""
        return self.path.name if self.member is None else self.member.split("/")[-1]

    @property
    def folder(self) -> tuple[str, ...]:
        """The names of the folders that it lies in, outermost first."""
        if self.member is None:
            return self.path.absolute().parent.parts
        return (str(self.path), *PurePosixPath(self.member).parts[:-1])


def is_archive(path: Path | str) -> bool:
    """Tell whether a file's name is that of an archive that can be read."""
    return Path(path).name.lower().endswith(ARCHIVE_SUFFIXES)


def strip_archive_suffix(path: Path) -> str:
    """Give a folder's, an archive's or a DICOM file's name without its ending."""
    name = path.resolve().name
    for suffix in sorted((*ARCHIVE_SUFFIXES, ".dcm"), key=len, reverse=True):
        if path.is_file() and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def holds_dicom(source: Path) -> bool:
    """Tell whether there is a DICOM file; needs no DICOM library.

    Args:
        source: A folder, a file or an archive.

    Returns:
        True at the first file that begins as DICOM files do.
    """
    return any(True for _ in iterate_files(source))


def iterate_files(source: Path) -> Iterator[tuple[DicomFile, IO[bytes]]]:
    """Go through all DICOM files of a folder, with those below it, or an archive.

    Args:
        source: A folder, an archive, or one DICOM file.

    Yields:
        The file, and a stream of its bytes that is valid until the next one. Links to
        folders are not followed; files that don't begin as DICOM files do are left out.

    Raises:
        FormatError: There is no such path; an archive is broken, too large, or holds
            links or names that lead out of it.
    """
    if not source.exists():
        raise FormatError(describe("there is no such file or folder", file=source))
    if source.is_file() and is_archive(source):
        yield from _members(source, lambda name: True)
        return
    for path in [source] if source.is_file() else _walk(source):
        yield from _open(path)


def open_files(files: Sequence[DicomFile]) -> Iterator[tuple[DicomFile, IO[bytes]]]:
    """Open DICOM files again, each archive read through once.

    Args:
        files: What `iterate_files` gave, in any order.

    Yields:
        As `iterate_files`; the order is that of the files, or of an archive's entries.

    Raises:
        FormatError: A file has vanished, or an archive is broken.
    """
    found = 0
    for file in (file for file in files if file.member is None):
        for item in _open(file.path):
            found += 1
            yield item
    archives = dict.fromkeys(file.path for file in files if file.member is not None)
    for archive in archives:
        names = {file.member for file in files if file.path == archive}
        for item in _members(archive, names.__contains__):
            found += 1
            yield item
    if found != len(set(files)):
        raise FormatError(
            describe(
                "DICOM files vanished while they were read",
                expected=f"{len(set(files))} files",
                found=found,
                file=files[0].path.parent,
            )
        )


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file() and not name.startswith("."):
                yield path


def _open(path: Path) -> Iterator[tuple[DicomFile, IO[bytes]]]:
    try:
        with path.open("rb") as stream:
            if _is_dicom(stream):
                yield DicomFile(path, None, path.stat().st_size), stream
    except OSError as error:
        raise FormatError(
            describe(
                "can't read a file",
                found=error.strerror or type(error).__name__,
                file=path,
                remedy="Check the path and the rights.",
            )
        ) from error


def _is_dicom(stream: IO[bytes]) -> bool:
    head = stream.read(_MAGIC_AT + len(_MAGIC))
    stream.seek(0)
    return head[_MAGIC_AT:] == _MAGIC


def _members(
    path: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[DicomFile, IO[bytes]]]:
    """Read an archive's DICOM files one by one into memory."""
    with _refusing_broken(path):
        entries = _zip_entries if path.name.lower().endswith(".zip") else _tar_entries
        total = 0
        for count, (name, is_wanted, read) in enumerate(entries(path, wanted)):
            _check_name(path, name)
            if count >= MAX_ARCHIVE_FILES:
                raise _too_large(path, f"{MAX_ARCHIVE_FILES} files")
            data = read() if is_wanted else b""
            total += len(data)
            if total > MAX_ARCHIVE_BYTES:
                raise _too_large(path, _size(MAX_ARCHIVE_BYTES))
            if data[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC:
                yield DicomFile(path, name, len(data)), io.BytesIO(data)


Entry = tuple[str, bool, Callable[[], bytes]]


def _zip_entries(path: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > MAX_ARCHIVE_BYTES:
            raise _too_large(path, _size(MAX_ARCHIVE_BYTES))
        for info in archive.infolist():
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise _unsafe(path, f"a link ({info.filename})")

            def read(info: zipfile.ZipInfo = info) -> bytes:
                with archive.open(info) as stream:
                    return _bounded(path, stream)

            yield info.filename, not info.is_dir() and wanted(info.filename), read


def _tar_entries(path: Path, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    claimed = 0  # what lies between the entries wanted must be decompressed, too
    with tarfile.open(path, "r:*") as archive:
        for info in archive:
            claimed += info.size
            if claimed > MAX_ARCHIVE_BYTES:
                raise _too_large(path, _size(MAX_ARCHIVE_BYTES))
            if not (info.isreg() or info.isdir()):
                raise _unsafe(path, f"a link or device ({info.name})")

            def read(info: tarfile.TarInfo = info) -> bytes:
                stream = archive.extractfile(info)
                return b"" if stream is None else _bounded(path, stream)

            yield info.name, info.isreg() and wanted(info.name), read


def _bounded(path: Path, stream: IO[bytes]) -> bytes:
    """Read a DICOM file whole, anything else not; memory grows with what comes out."""
    head = stream.read(_MAGIC_AT + len(_MAGIC))
    if head[_MAGIC_AT:] != _MAGIC:
        return b""
    parts, size = [head], len(head)
    while chunk := stream.read(_CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_FILE_BYTES:
            raise _too_large(path, f"{_size(MAX_FILE_BYTES)} for a file in it")
    return b"".join(parts)


def _check_name(path: Path, name: str) -> None:
    """Refuse names that would lead out: nothing is unpacked, but none has reason to."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise _unsafe(path, f"a name that leads out of it ({name!r})")


def _unsafe(path: Path, found: str) -> FormatError:
    return FormatError(
        describe(
            "an archive is not safe to read",
            expected="plain files and folders",
            found=found,
            file=path,
            remedy="Pack the study anew, without links.",
        )
    )


def _size(most: int) -> str:
    whole = f"{most >> 30} GiB" if most >= 1 << 30 else f"{most >> 20} MiB"
    return f"{whole} unpacked"


def _too_large(path: Path, most: str) -> FormatError:
    return FormatError(
        describe(
            "an archive is too large",
            expected=f"at most {most}",
            file=path,
            remedy="Unpack it, and give the folder.",
        )
    )


@contextmanager
def _refusing_broken(path: Path) -> Iterator[None]:
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except Exception as error:  # zipfile and tarfile raise nearly every type there is
        raise FormatError(
            describe(
                "an archive is broken or locked",
                expected="a whole zip or tar without a password",
                found=(str(error).splitlines() or [type(error).__name__])[0],
                file=path,
                remedy="Copy or download it again.",
            )
        ) from error
