"""What a file really is, by its first bytes; names and endings of scans."""

from __future__ import annotations

import codecs
import zlib
from pathlib import Path
from typing import Literal, NoReturn, cast

from isal import isal_zlib

from segmamba.errors import ConfigError, FormatError, describe

SCAN_SUFFIXES: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
"""Endings of the files that can be read and written."""

Format = Literal["nifti", "nrrd", "mha"]

GZIP_MAGIC = b"\x1f\x8b"
# isal's type stub calls its exception class an instance
INFLATION_ERRORS = (cast("type[Exception]", isal_zlib.error), zlib.error, EOFError)
"""What a broken compressed stream raises."""
MAX_INFLATION = 1032
"""Most bytes that one byte of deflate can turn into (RFC 1951: 258 bytes in 2 bits)."""

_HEAD_BYTES = 4096


class FakeFileError(FormatError):
    """A file is something else than a scan, such as a pointer to one."""


class TruncatedFileError(FormatError):
    """A file ends before the voxels that its header promises."""


def is_scan(path: Path | str) -> bool:
    """Tell whether a file's name is that of a scan.

    Args:
        path: A path; the file needn't exist.

    Returns:
        True for the endings in `SCAN_SUFFIXES`, in any case; False for hidden files,
        such as the `._x` files that macOS leaves.
    """
    name = Path(path).name
    return not name.startswith(".") and name.lower().endswith(SCAN_SUFFIXES)


def strip_suffix(path: Path | str) -> str:
    """Give a scan's name without its folder and ending.

    Args:
        path: A path such as `a/case_1.nii.gz`.

    Returns:
        The stem, such as `case_1`; names without a scan's ending lose their last one.
    """
    name = Path(path).name
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return Path(name).stem


def scan_suffix(path: Path | str) -> str:
    """Give the ending of a scan's name, in small letters.

    Args:
        path: A path such as `a/case_1.nii.gz`.

    Returns:
        One of `SCAN_SUFFIXES`.

    Raises:
        ConfigError: The name has another ending.
    """
    name = Path(path).name.lower()
    for suffix in sorted(SCAN_SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return suffix
    raise ConfigError(
        describe(
            "can't tell the format of a scan from its name",
            expected="one of " + ", ".join(SCAN_SUFFIXES),
            found=Path(path).name,
            remedy="Give the file one of these endings.",
        )
    )


def read_head(path: Path, size: int = _HEAD_BYTES) -> bytes:
    """Read the first bytes of a file, decompressed if it is gzip.

    Args:
        path: The file.
        size: Bytes wanted, after decompression.

    Returns:
        At most `size` bytes; fewer where the file is shorter.

    Raises:
        FormatError: The file is missing, empty, unreadable or broken gzip.
    """
    try:
        with path.open("rb") as file:
            head = file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        _raise_unreadable(path, error)
    if not head:
        raise TruncatedFileError(
            describe("a file is empty", expected="a scan", found="0 bytes", file=path)
        )
    return inflate_head(path, head, size) if head[:2] == GZIP_MAGIC else head


def inflate_head(path: Path, data: bytes, size: int) -> bytes:
    """Decompress the start of a gzip stream.

    Args:
        path: The file, for the error.
        data: Its first bytes.
        size: Most bytes wanted.

    Returns:
        At most `size` bytes.

    Raises:
        FormatError: The stream is broken.
    """
    try:
        head = isal_zlib.decompressobj(wbits=31).decompress(data, size)
    except INFLATION_ERRORS as error:
        raise _broken_gzip(path, str(error)) from error
    if not head:
        raise _broken_gzip(path, f"{len(data)} bytes that hold nothing")
    return head


def _broken_gzip(path: Path, found: str) -> TruncatedFileError:
    return TruncatedFileError(
        describe(
            "a gzip stream is broken",
            expected="a whole .nii.gz",
            found=found,
            file=path,
            remedy="Copy or download the file again.",
        )
    )


def detect_format(path: Path, head: bytes) -> Format:
    """Tell a scan's format from its first bytes; the name plays no part.

    Args:
        path: The file, for the error.
        head: Its first bytes, decompressed.

    Returns:
        "nifti", "nrrd" or "mha".

    Raises:
        FormatError: It is none of them; the text says what it seems to be.
    """
    if _is_nifti(head):
        return "nifti"
    if head.startswith(b"NRRD00"):
        return "nrrd"
    if b"ElementDataFile" in head or head.startswith((b"ObjectType", b"NDims")):
        return "mha"
    seems, remedy = _describe_content(head)
    raise FakeFileError(
        describe(
            "not a scan",
            expected="NIfTI, NRRD, MHA or MHD",
            found=seems,
            file=path,
            remedy=remedy,
        )
    )


def _is_nifti(head: bytes) -> bool:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if 348 in sizes:
        return head[344:347] in (b"n+1", b"ni1")
    return 540 in sizes and head[4:7] in (b"n+2", b"ni2")


def _describe_content(head: bytes) -> tuple[str, str]:
    """Say what the bytes of a wrong file seem to be, and the remedy."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200]
    low = start.lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer", "Run `git lfs pull` in its folder."
    if b"annex/objects/" in head[:1024]:
        return "a git-annex pointer", "Run `git annex get` on it."
    if low.startswith((b"<!doctype html", b"<html")):
        return "an HTML page", "Download the file again; this is an error page."
    if head[128:132] == b"DICM":
        remedy = "Give `segmamba predict` the folder with the whole series, or convert "
        return "a DICOM file", remedy + "it to NIfTI first, with dcm2niix."
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive", "Unpack it first."
    if 348 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")):
        return (
            "an Analyze 7.5 header",
            "Convert it to NIfTI; it lacks left and right.",
        )
    if _is_text(head):
        line = start.decode("utf-8", "replace").splitlines()[0][:50] if start else ""
        return f"text ({line!r})", "Put the scan itself in its place."
    return f"unknown bytes ({head[:8].hex(' ')} ...)", "Put a scan in its place."


def _is_text(head: bytes) -> bool:
    try:  # incremental, because the head may end within a character
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not any(byte < 32 and byte not in b"\t\r\n\f" for byte in head)


def _raise_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    try:
        target = str(path.readlink())
    except (OSError, ValueError):  # no link
        target = ""
    if "annex" in target and "objects" in target:
        raise FakeFileError(
            describe(
                "not a scan",
                expected="NIfTI, NRRD, MHA or MHD",
                found="a git-annex link without its content",
                file=path,
                remedy="Run `git annex get` on it.",
            )
        ) from error
    raise FormatError(
        describe(
            "can't open a scan",
            expected="a readable file",
            found=getattr(error, "strerror", None) or error,
            file=path,
            remedy="Check the path and the rights.",
        )
    ) from error
