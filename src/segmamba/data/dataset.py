"""A data set as it lies on disk: cases, channels, labels. Nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segmamba.data.labels import LabelScheme


@dataclass(frozen=True)
class Case:
    """One subject's scan: its files, and its label map if there is one."""

    id: str
    """Unique in the data set, and the stem of what is written for the case."""
    images: tuple[Path, ...]
    """One file per channel, or a single file that holds all channels (4D)."""
    label: Path | None = None
    """The label map; None for a case that is only predicted."""


@dataclass(frozen=True)
class Dataset:
    """Cases that share channels and labels."""

    name: str
    root: Path
    layout: str
    """msd, nnunet, brats or csv."""
    channels: tuple[str, ...]
    """Names of the image channels, such as ("T1", "FLAIR") or ("CT",)."""
    labels: LabelScheme
    cases: tuple[Case, ...]
    """Cases with a label map, sorted by id."""
    unlabelled: tuple[Case, ...] = ()
    """Cases without one (test folders), sorted by id."""
