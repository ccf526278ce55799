"""Decompress voxels, never beyond what the header claims or the file really holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from isal import isal_zlib

from segmamba.errors import FormatError, describe
from segmamba.io.formats import (
    GZIP_MAGIC,
    INFLATION_ERRORS,
    MAX_INFLATION,
    TruncatedFileError,
)

GZIP = 31
ZLIB = 15
"""Values of zlib's `wbits` for the two kinds of stream."""

_CHUNK = 1 << 20


def inflate(path: Path, data: bytes | memoryview, num_bytes: int) -> bytes:
    """Decompress all members of a gzip stream, or one zlib stream.

    Memory grows with what really comes out, not with what a header claims.

    Args:
        path: The file, for errors.
        data: The compressed bytes.
        num_bytes: Bytes wanted, 1 or more.

    Returns:
        The first `num_bytes` bytes.

    Raises:
        TruncatedFileError: The stream is damaged or ends early.
    """
    parts: list[bytes] = []
    missing, rest = num_bytes, data
    wbits = GZIP if bytes(data[:2]) == GZIP_MAGIC else ZLIB
    while missing > 0 and len(rest):
        if wbits == GZIP and bytes(rest[:2]) != GZIP_MAGIC:
            break  # padding behind the last member
        stream = isal_zlib.decompressobj(wbits=wbits)
        part = _decompress(path, stream, rest, missing)
        _reach_checksum(path, stream, num_bytes)
        parts.append(part)
        missing -= len(part)
        rest = stream.unused_data if stream.eof and wbits == GZIP else b""
    if missing > 0:
        raise too_short(path, num_bytes, num_bytes - missing)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_room(path: Path, found: int, wanted: int, compressed: bool) -> None:
    """Refuse voxels that a file can't hold or memory can't take, before it is taken.

    Args:
        path: The file, for errors.
        found: Bytes that are there for them.
        wanted: Bytes that the header claims, decompressed.
        compressed: Whether those that are there are deflate's.

    Raises:
        TruncatedFileError: The file is too small.
        FormatError: This computer's memory is too small.
    """
    most = found * MAX_INFLATION if compressed else found
    if most < wanted:
        phrase = f"{found} compressed bytes" if compressed else found
        raise too_short(path, wanted, phrase)
    memory = _memory_bytes()
    if wanted > memory:
        raise FormatError(
            describe(
                "a scan does not fit into memory",
                expected=f"at most {memory >> 30} GiB of voxels",
                found=f"{wanted >> 30} GiB by its header",
                file=path,
                remedy="If the header is right, crop or resample the scan first.",
            )
        )


def _memory_bytes() -> int:
    """Give this computer's memory, or no bound where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # such as Windows
        return sys.maxsize


def too_short(path: Path, expected: int, found: object) -> TruncatedFileError:
    """Compose the error for a file that ends early.

    Args:
        path: The file.
        expected: Bytes that the header promises.
        found: Bytes that are there, or a phrase.

    Returns:
        The error, to be raised.
    """
    text = f"{found} bytes" if isinstance(found, int) else str(found)
    return TruncatedFileError(
        describe(
            "a scan is truncated",
            expected=f"{expected} bytes by its header",
            found=text,
            file=path,
            remedy="Copy or download the file again.",
        )
    )


def _reach_checksum(path: Path, stream: Any, most: int) -> None:
    """Go on to the end of a stream, which tests its checksum; give up after `most`."""
    beyond = 0
    while not stream.eof and beyond <= most:
        chunk = _decompress(path, stream, stream.unconsumed_tail, _CHUNK)
        beyond += len(chunk)
        if not chunk:
            return


def _decompress(path: Path, stream: Any, data: bytes | memoryview, most: int) -> bytes:
    try:
        return stream.decompress(data, most)
    except (*INFLATION_ERRORS, MemoryError, OverflowError) as error:
        raise TruncatedFileError(
            describe(
                "a compressed stream is broken",
                found=str(error),
                file=path,
                remedy="Copy or download the file again.",
            )
        ) from error
