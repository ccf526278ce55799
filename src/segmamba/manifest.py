"""The record beside every output: what went in, what came out, with what, and how.

`docs/reference/manifest.md` describes the files that are made of these parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch

from segmamba._version import __version__
from segmamba.atomic import write_json
from segmamba.devices import peak_memory_mib
from segmamba.ops.backends import automatic_backend
from segmamba.types import JsonDict

FORMAT = "segmamba manifest"
FORMAT_VERSION = 1
"""Raised when a key changes its meaning or goes."""

NAME = "manifest.json"
"""The manifest of a folder."""

_PACKAGES = ("numpy", "numba", "nibabel", "pydicom")
_KEPT_WARNINGS = 100
_LOGGER = "segmamba"


_typed: ContextVar[str | None] = ContextVar("typed", default=None)


@contextlib.contextmanager
def typed(words: Sequence[str]) -> Iterator[None]:
    """Let the sessions inside know the command line that they come from.

    Args:
        words: After the program's name.
    """
    token = _typed.set(shlex.join(["segmamba", *words]))
    try:
        yield
    finally:
        _typed.reset(token)


class Session(logging.Handler):
    """One call of a command: when it began, how, and what was warned of.

    Warnings are those that the library logs while the session is entered as a context.

    Args:
        command: Such as "predict".
    """

    def __init__(self, command: str) -> None:
        super().__init__(logging.WARNING)
        self.command, self.command_line = command, _typed.get()
        self.warnings: list[str] = []
        self.started = datetime.now(timezone.utc)
        self._clock = time.monotonic()

    def __enter__(self) -> Session:
        logging.getLogger(_LOGGER).addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logging.getLogger(_LOGGER).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning's text, once."""
        text = record.getMessage()
        if text not in self.warnings and len(self.warnings) < _KEPT_WARNINGS:
            self.warnings.append(text)

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return round(time.monotonic() - self._clock, 3)

    def describe(self, device: torch.device | None = None) -> JsonDict:
        """Give what every manifest begins with.

        Args:
            device: Where the networks are; None where there are none.

        Returns:
            format, command, times, versions, machine, memory and warnings, for JSON.
        """
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "command_line": self.command_line,
            "folder": str(Path.cwd()),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "versions": versions(),
            "machine": machine(device),
            "peak_memory_mib": peak_memory(device),
            "warnings": list(self.warnings),
        }


def manifest_path(output: Path) -> Path:
    """Say where the manifest of an output lies.

    Args:
        output: A file, such as label.nii.gz or metrics.json.

    Returns:
        Beside it, such as label_manifest.json or metrics_manifest.json.
    """
    return output.with_name(f"{output.name.split('.')[0]}_{NAME}")


def write_manifest(
    output: Path | str,
    session: Session,
    options: JsonDict,
    inputs: Iterable[Path | str],
    outputs: Iterable[Path | str],
) -> None:
    """Write the manifest beside what a command without networks has written.

    Args:
        output: Its main file.
        session: The command's call.
        options: Of the command.
        inputs: Files that were read.
        outputs: Files that were written, in the folder of `output` or below.

    Raises:
        OSError: It can't be written.
    """
    path = manifest_path(Path(output))
    data = {
        **session.describe(),
        "options": options,
        "inputs": [file_record(Path(name)) for name in inputs],
        "outputs": [file_record(Path(name)) for name in outputs],
    }
    write_json(path, data)


def file_record(path: Path, folder: Path | None = None) -> JsonDict:
    """Tell a file from all others.

    Args:
        path: The file.
        folder: Its name is given relative to this; None gives its absolute path.

    Returns:
        "path", "bytes", "modified" (nanoseconds since 1970) and "sha256"; the last
        three are None where the file can't be read.
    """
    name = str(path.absolute() if folder is None else path.relative_to(folder))
    try:
        status = path.stat()
        digest = _digest(path)
    except OSError:
        return {"path": name, "bytes": None, "modified": None, "sha256": None}
    return {
        "path": name,
        "bytes": status.st_size,
        "modified": status.st_mtime_ns,
        "sha256": digest,
    }


def files_record(folder: Path, paths: Iterable[Path]) -> JsonDict:
    """Tell many files from all others by one record, such as the slices of a series.

    Args:
        folder: What they are called together.
        paths: The files; their order doesn't matter.

    Returns:
        As `file_record`, with "files", their number; the sum is that of their sums in
        the order of their paths.
    """
    records = [file_record(path) for path in sorted(set(paths))]
    known = all(record["sha256"] for record in records)
    return {
        "path": str(folder.absolute()),
        "files": len(records),
        "bytes": sum(record["bytes"] for record in records) if known else None,
        "modified": max(r["modified"] for r in records) if known and records else None,
        "sha256": combined_sum(records) if known else None,
    }


def combined_sum(records: Iterable[JsonDict]) -> str:
    """Sum up records of files: the SHA-256 of their sums, one a line."""
    text = "".join(f"{record['sha256']}\n" for record in records)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> JsonDict:
    """Give the versions of what computes; None for what is absent."""
    return {
        "segmamba": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: package_version(name) for name in _PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Give an installed package's version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device | None) -> JsonDict:
    """Describe what computes: system, processor, threads, device, back end of scans."""
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": None if device is None else str(device),
        "gpu": _gpu_name(device),
        "backend": None if device is None else automatic_backend(device)[0],
    }


def processor_name() -> str:
    """Give the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device | None) -> JsonDict:
    """Give the most memory that this process held so far, in MiB; None for unknown."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "process": peak_memory_mib(torch.device("cpu")),
        "gpu": peak_memory_mib(device) if device is not None and on_gpu else None,
    }


def _gpu_name(device: torch.device | None) -> str | None:
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.get_device_name(device)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
