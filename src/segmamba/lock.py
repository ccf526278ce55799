"""One writer in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from segmamba.atomic import remove_leftovers
from segmamba.errors import ConfigError, describe

_FAR = 1 << 30  # Windows locks a byte range: one far behind the text leaves it readable
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def folder_lock(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder for this process alone, for one kind of work.

    The operating system frees the lock when the process ends, however it ends, so a
    killed run never blocks the next one. A file system without locks is not guarded.
    What a killed run had half-written is removed.

    Args:
        folder: Made if it is missing.
        work: Such as "training"; the lock is the file `training.lock` in the folder.

    Raises:
        ConfigError: Another process writes to the folder (the text says which), or
            the folder can't be written to.
    """
    path = folder / f"{work}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, is_held = _take(path)
    except OSError as error:
        raise ConfigError(
            describe("can't write to this folder", found=error, file=folder)
        ) from error
    try:
        if is_held:
            remove_leftovers(folder)
        yield
    finally:
        if os.name == "nt":
            os.close(descriptor)  # Windows can't remove an open file
            _remove(path)
        else:
            _remove(path)
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove the lock's file, unless another process tries the lock just now.

    Windows forbids it then; a file that nobody has locked blocks nobody.
    """
    with contextlib.suppress(PermissionError):
        path.unlink(missing_ok=True)


def _take(path: Path) -> tuple[int, bool]:
    """Give the lock's open file, and whether the file system does lock it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_held = _lock(descriptor)
            if _is_still(path, descriptor):
                _sign(descriptor)
                return descriptor, is_held
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(_held(path)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it in between: try the new file


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return False
        if error.errno in (errno.EACCES, errno.EDEADLK):  # Windows' word for taken
            raise BlockingIOError(str(error)) from error
        raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write down who holds the lock; on a full disk, the lock holds unsigned."""
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())


def _held(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        found = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        found = "another process"
    return describe(
        f"another {path.stem} writes to this folder",
        found=found,
        file=path.parent,
        remedy="Wait for it, stop it, or choose another folder.",
    )
