"""All readers, by name."""

from __future__ import annotations

from pathlib import Path

import documents
import scans
from target import Target

NAMES = (
    *("nifti", "nifti-gzip", "nrrd", "mha", "mhd"),
    *("dicom-file", "dicom-folder"),
    *("archive-zip", "archive-tar", "archive-tar-gz", "archive-tar-xz"),
    *("plan", "dataset", "table", "splits", "config"),
    *("fingerprint", "postprocessing", "segments"),
    *("checkpoint", "published", "run-model", "run-plan", "run-dataset"),
    *("cache-image", "cache-label", "cache-foreground", "cache-marker"),
)


def make_targets(scratch: Path) -> dict[str, Target]:
    """Make all of them.

    Args:
        scratch: An empty folder.

    Returns:
        Targets by name, in the order of `NAMES`.
    """
    made = (
        *scans.scans(scratch),
        *scans.dicom(),
        *documents.texts(),
        *documents.checkpoints(scratch),
        *documents.caches(scratch),
    )
    found = {target.name: target for target in made}
    assert tuple(found) == NAMES
    return found
