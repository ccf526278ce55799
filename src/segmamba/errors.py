"""The exceptions that this package raises on purpose.

Each message says what was expected, what was found, in which file, and the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

_LONGEST_PART, _LONG_WORD = 4000, re.compile(r"(\S{200})\S{200,}")


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

    What files hold may be anything: signs that a terminal would obey are written as
    escapes, and what is too long to read is cut.

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
        parts.append(f"expected {_cut(expected)}")
    if found is not None:
        parts.append(f"found {_cut(found)}")
    if file is not None:
        parts.append(f"in {_shown(file)}")
    text = _cut(problem) + (": " + ", ".join(parts) if parts else "") + "."
    return f"{text} {remedy}" if remedy else text


def _cut(part: object) -> str:
    text = _LONG_WORD.sub(r"\1...", str(part))
    return _shown(text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]} ...")


def _shown(part: object) -> str:
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1]
        for sign in str(part)
    )
