"""Look at JPEG headers before GDCM does: on some damage it ends the whole process."""

from __future__ import annotations

from typing import Any

_START, _SCAN = 0xD8, 0xDA
_TABLES = 0xC4
_FRAMES = {0xC0, 0xC1, 0xC3}
"""Baseline, extended and lossless: what DICOM allows."""


def check_jpeg(frame: bytes, rows: int, columns: int, bits: int) -> None:
    """Refuse a JPEG stream whose header is damaged or of another image.

    Args:
        frame: The stream.
        rows: That the DICOM header states.
        columns: That the DICOM header states.
        bits: BitsAllocated.

    Raises:
        ValueError: It is; the text says how.
    """
    seen: set[int] = set()
    place, marker = 2, 0
    if frame[:2] != bytes((0xFF, _START)):
        raise ValueError("no JPEG stream")
    while marker != _SCAN:
        while frame[place : place + 2] == b"\xff\xff":  # padding is allowed
            place += 1
        if len(frame) < place + 4 or frame[place] != 0xFF:
            raise ValueError("a damaged JPEG header")
        marker = frame[place + 1]
        length = int.from_bytes(frame[place + 2 : place + 4], "big")
        body = frame[place + 4 : place + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise ValueError("a damaged JPEG header")
        if marker in _FRAMES:
            _check_size(body, rows, columns, bits)
        seen.add(marker)
        place += 2 + length
    if not seen & _FRAMES or _TABLES not in seen:
        raise ValueError("a JPEG header without size or tables")


def _check_size(body: Any, rows: int, columns: int, bits: int) -> None:
    found = (*(int.from_bytes(body[i : i + 2], "big") for i in (1, 3)), body[5])
    if len(body) != 9 or found != (rows, columns, 1) or not 2 <= body[0] <= bits:
        raise ValueError(f"JPEG of another size: {found}, {body[0]} bits")
