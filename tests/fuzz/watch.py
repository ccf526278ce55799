"""Sees what a piece of code does to the computer, by Python's own audit events."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

RUNS = (
    *("pickle.find_class", "os.system", "os.exec", "os.fork"),
    *("os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"),
    *("ctypes.dlopen", "webbrowser.open"),
)
WRITES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree"),
    *("shutil.copyfile", "shutil.move", "shutil.unpack_archive", "tempfile.mkstemp"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_seen: list[tuple[str, Any]] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and bool(args[2] & _WRITING)
    if writes or event in RUNS or event in WRITES:
        _seen.append((event, args))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching() -> Iterator[list[tuple[str, Any]]]:
    """Collect what the code inside runs, connects to, or changes on the disk."""
    global _seen
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # what is imported late would be compiled to disk
    _seen = found = []
    try:
        yield found
    finally:
        _seen, sys.dont_write_bytecode = None, before
