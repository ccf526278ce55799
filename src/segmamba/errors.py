"""The exceptions that this package raises on purpose.

Each message says what was expected, what was found, in which file, and the remedy.
"""

from __future__ import annotations

from pathlib import Path


class SegMambaError(Exception):
    """Base of every error that segmamba raises on purpose."""


class ConfigError(SegMambaError, ValueError):
    """An option, a configuration file or a plan holds something unusable."""


class GeometryError(SegMambaError, ValueError):
    """Shapes, spacings or affines do not fit each other."""


class FormatError(SegMambaError, ValueError):
    """A file or data set is unreadable or not what its name claims."""


class CheckpointError(SegMambaError):
    """A checkpoint or weight file does not fit."""


class BackendUnavailableError(SegMambaError, RuntimeError):
    """A device, back end or optional package is not there."""


class TrainingError(SegMambaError, RuntimeError):
    """Training can't go on, such as after a not-a-number."""


def describe(
    problem: str,
    *,
    expected: object | None = None,
    found: object | None = None,
    file: Path | str | None = None,
    remedy: str | None = None,
) -> str:
    """Compose an error text in the house's order.

    Args:
        problem: One sentence without a full stop.
        expected: What would have been right.
        found: What was there instead.
        file: The file concerned.
        remedy: What the user can do.

    Returns:
        A text such as "bad shape: expected (4, 4), found (3, 3), in a.nii. Crop it."
    """
    parts = []
    if expected is not None:
        parts.append(f"expected {expected}")
    if found is not None:
        parts.append(f"found {found}")
    if file is not None:
        parts.append(f"in {file}")
    text = problem + (": " + ", ".join(parts) if parts else "") + "."
    return f"{text} {remedy}" if remedy else text
