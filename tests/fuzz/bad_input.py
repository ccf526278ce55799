"""One kind of bad input: how it is made, and the error that a user sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segmamba.console import explain
from segmamba.errors import SegMambaError


@dataclass(frozen=True)
class BadInput:
    """A kind of bad input, in words, and how to make and read one."""

    what: str
    make: Callable[[Path], Path]
    """Writes it below an empty folder; gives the path to read."""
    read: Callable[[Path], object]
    foreign: bool = False
    """Whether the text after "found" is a library's, which its versions change."""

    def text(self, folder: Path) -> str:
        """Make it in an empty folder and give the error's text, paths made short."""
        path = self.make(folder)
        try:
            self.read(path)
        except SegMambaError as error:
            return explain(error).replace(f"{folder}/", "").replace(str(folder), ".")
        raise AssertionError(f"accepted: {self.what}")


def write(name: str, data: bytes | str) -> Callable[[Path], Path]:
    """Make a file of these bytes."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return make
