"""Formats whose header is text: what NRRD, MHA and MHD share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segmamba.errors import FormatError, SegMambaError, describe
from segmamba.io.formats import GZIP_MAGIC
from segmamba.io.inflation import check_room, inflate, too_short
from segmamba.types import Array, FloatArray, Size3

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns an affine of ITK's world (left, posterior, superior) into RAS+."""

_FIRST_LOOK, _LONGEST_HEADER = 1 << 16, 1 << 24


@dataclass(frozen=True)
class TextHeader:
    """Where the voxels lie in the file, and where in the patient."""

    sizes: tuple[int, ...]
    """Voxels along each axis of the file, the fastest first; three or four."""
    channel_axis: int | None
    """Which of them counts channels; None if there are three."""
    affine: FloatArray
    dtype: np.dtype[Any]
    """Type on disk, with its byte order."""
    offset: int
    """Bytes in front of the voxels; -1 if they are the file's last bytes."""
    compressed: bool
    voxels: Path
    """The file that holds them: the header's own, or one beside it."""

    @property
    def shape(self) -> Size3:
        """Voxels along I, J, K."""
        i, j, k = (self.sizes[axis] for axis in self._spatial_axes)
        return i, j, k

    @property
    def channels(self) -> int:
        """Channels in the file."""
        return 1 if self.channel_axis is None else self.sizes[self.channel_axis]

    @property
    def num_bytes(self) -> int:
        """Bytes of the voxels, decompressed."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def _spatial_axes(self) -> list[int]:
        return [axis for axis in range(len(self.sizes)) if axis != self.channel_axis]

    @property
    def order(self) -> list[int]:
        """Axes of the file in the order (C, I, J, K), or (I, J, K)."""
        first = [] if self.channel_axis is None else [self.channel_axis]
        return first + self._spatial_axes


def read_text_head(path: Path, end: bytes) -> bytes:
    """Read a text header.

    Args:
        path: The file.
        end: What ends the header.

    Returns:
        The bytes up to and with `end`, and some more.

    Raises:
        FormatError: The header doesn't end, or the whole file is gzip.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_FIRST_LOOK)
            if end not in head.replace(b"\r\n", b"\n"):
                head += file.read(_LONGEST_HEADER)
    except OSError as error:
        raise _cannot_read(path, error) from error
    if head[:2] == GZIP_MAGIC:
        raise bad_text_header(path, "the file itself", "it packed by gzip")
    if end not in head.replace(b"\r\n", b"\n"):
        raise bad_text_header(path, "a header with an end", "none")
    return head


def check_text_size(path: Path, header: TextHeader) -> None:
    """Refuse a file that can't hold what its header claims, before memory is taken.

    Args:
        path: The file.
        header: Its header.

    Raises:
        FormatError: It is too small or claims more than memory holds, or the file
            beside it that holds the voxels is missing.
    """
    try:
        found = header.voxels.stat().st_size - max(header.offset, 0)
    except OSError as error:
        raise _cannot_read(header.voxels, error) from error
    check_room(path, found, header.num_bytes, header.compressed)


def read_text_voxels(header: TextHeader) -> Array:
    """Read the voxels behind a text header.

    Args:
        header: What its header says.

    Returns:
        (C, I, J, K), with the file's number type and byte order, not writable.

    Raises:
        FormatError: The file ends early or is damaged.
    """
    path = header.voxels
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error
    start = header.offset if header.offset >= 0 else len(data) - header.num_bytes
    body: bytes | memoryview = memoryview(data)[max(start, 0) :]
    if header.compressed:
        body = inflate(path, body, header.num_bytes)
    elif len(body) < header.num_bytes:  # it shrank since its size was looked at
        raise too_short(path, header.num_bytes, len(body))
    flat = np.frombuffer(body, header.dtype, math.prod(header.sizes))
    last = len(header.sizes) - 1
    array = flat.reshape(header.sizes[::-1])
    array = array.transpose([last - axis for axis in header.order])
    return array if header.channel_axis is not None else array[None]


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong while a header is parsed into one error.

    Args:
        path: The file.
        kind: What it should be, such as "NRRD".

    Raises:
        FormatError: Something went wrong.
    """
    try:
        with np.errstate(all="ignore"):  # affines are checked afterwards
            yield
    except SegMambaError:
        raise
    except (KeyError, ValueError, IndexError, OverflowError) as error:
        word = error.args[0] if isinstance(error, KeyError) else ""
        found = f"no, or an unknown, {word!r}" if word else f"this in it: {error}"
        raise bad_text_header(path, f"a valid {kind} header", found) from error


def bad_text_header(path: Path, expected: str, found: object) -> FormatError:
    """Compose the error for an unusable header.

    Args:
        path: The file.
        expected: What would have been right.
        found: What was there.

    Returns:
        The error, to be raised.
    """
    return FormatError(
        describe(
            "can't use a scan's header",
            expected=expected,
            found=found,
            file=path,
            remedy="Convert the file from its source again.",
        )
    )


def _cannot_read(path: Path, error: OSError) -> FormatError:
    return FormatError(
        describe(
            "can't read a scan",
            found=error.strerror or type(error).__name__,
            file=path,
            remedy="Check the path and the rights.",
        )
    )


def numbers(text: str) -> list[float]:
    """Read numbers parted by blanks; anything else raises ValueError."""
    return [float(word) for word in text.split()]


def join_numbers(values: Any, separator: str = " ") -> str:
    """Write numbers so that they are read back exactly."""
    return separator.join(repr(float(value)) for value in values)
