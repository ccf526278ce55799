"""Whole files or none: write to a temporary name, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segmamba.errors import FormatError, describe

MADE_ANEW = "Mend it; or remove it, and it is made anew."
"""The remedy for files of a run that a power cut or an editor left unreadable."""
PREFIX = ".writing-"
"""How the names of unfinished files begin."""
LEFTOVER_AGE_S = 600.0
"""Older half-written files are of a killed run; younger ones may be another's."""


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place if all goes well.

    Args:
        path: The file to be written. Its folder is made if it is missing.

    Yields:
        A path in the same folder, with the same ending, to write to.

    Raises:
        OSError: It can't be written; the error names `path`.
    """
    path = Path(path)
    try:
        temporary = _new_file_beside(path)
        try:
            yield temporary
            flush_file(temporary)
            temporary.replace(path)
            _flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # numpy's, which says how much of it was written
            text = f"a write stopped short ({error})"
            raise OSError(errno.ENOSPC, text, str(path)) from error
        # A full disk names no file, and the temporary one means nothing to a user.
        if error.filename is None or PREFIX in str(error.filename):
            error.filename = str(path)
        raise


def _new_file_beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    temporary = path.parent / f"{PREFIX}{uuid.uuid4().hex}{suffix}"
    temporary.touch(exist_ok=False)  # as open to others as any new file of the user's
    return temporary


def remove_leftovers(folder: Path, age_s: float = 0.0) -> None:
    """Remove half-written files of killed processes.

    Args:
        folder: Where they lie; nobody writes to it, unless `age_s` is given.
        age_s: Leave those that are younger, in seconds: another process may be at
            work on them.

    Raises:
        OSError: They can't be removed.
    """
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if not age_s or time.time() - path.stat().st_mtime > age_s:
                path.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` atomically as indented JSON; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str, remedy: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        remedy: What to do if it can't be read.

    Raises:
        FormatError: The file is missing, unreadable or not JSON, holds numbers that are
            not finite, or a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or error
        raise FormatError(
            describe("can't read a JSON file", found=found, file=path, remedy=remedy)
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return keys


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if hasattr(data, "tolist"):
        return _finite(data.tolist())
    if isinstance(data, float) and not (-float("inf") < data < float("inf")):
        return None
    return str(data) if isinstance(data, Path) else data


def flush_file(path: Path) -> None:
    """Make sure that a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows can't open a folder for flushing; the rename is enough there.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
