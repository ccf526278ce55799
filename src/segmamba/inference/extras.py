"""What is written beside label maps, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, SegMambaError, describe
from segmamba.inference.dicom_study import SegOutput
from segmamba.inference.find import InputCase
from segmamba.inference.prediction import Prediction
from segmamba.inference.uncertainty import MAPS
from segmamba.io import read_header, strip_suffix
from segmamba.types import JsonDict

SUFFIX = ".nii.gz"
"""Ending of every map that is written, whatever the scan's format."""


@dataclass(frozen=True)
class CaseFiles:
    """Where the files of one case lie."""

    label_map: Path
    """Its label map."""
    alone: bool = False
    """Whether the label map's name was given, for a single case."""

    def map(self, kind: str) -> Path:
        """Name a map beside the label map.

        Args:
            kind: Such as "probabilities".

        Returns:
            `probabilities/<case>.nii.gz`, or `label_probabilities.nii.gz` beside
            label.nii.gz.
        """
        stem, folder = strip_suffix(self.label_map), self.label_map.parent
        if self.alone:
            return folder / f"{stem}_{kind}{SUFFIX}"
        return folder / kind / f"{stem}{SUFFIX}"

    @property
    def segmentation(self) -> Path:
        """The DICOM-SEG."""
        return self.label_map.with_name(f"{strip_suffix(self.label_map)}.dcm")


@dataclass(frozen=True)
class Extras:
    """What is written beside each label map."""

    probabilities: bool = False
    """Softmax or sigmoid maps."""
    uncertainty: bool = False
    """Maps of entropy, mutual information and confidence."""
    dicom_seg: SegOutput | None = None
    """DICOM-SEG, for scans that are DICOM."""

    def describe(self) -> JsonDict:
        """Give what was wanted, for the manifest."""
        return {
            "probabilities": self.probabilities,
            "uncertainty": self.uncertainty,
            "dicom_seg": None if self.dicom_seg is None else self.dicom_seg.kind,
        }

    def check(self, cases: Sequence[InputCase], scheme: LabelScheme) -> None:
        """Find out before anything is computed what can't be written.

        Raises:
            ConfigError: DICOM is wanted of scans that are none, or a description of
                segments fits no label.
            BackendUnavailableError: What writes DICOM isn't installed.
        """
        if self.dicom_seg is None:
            return
        others = [case for case in cases if not case.series and case.problem is None]
        if others:
            raise ConfigError(
                describe(
                    "only what was DICOM can be written as DICOM-SEG",
                    expected="a folder or archive of DICOM series",
                    found=f"case {others[0].id}",
                    file=others[0].images[0] if others[0].images else None,
                    remedy="Leave out --dicom-seg.",
                )
            )
        self.dicom_seg.check(scheme)

    def write(
        self,
        found: Prediction,
        files: CaseFiles,
        case: InputCase,
        scheme: LabelScheme,
    ) -> list[Path]:
        """Write all that is wanted, each file whole or not at all.

        Args:
            found: The prediction.
            files: Where to.
            case: The case, for what DICOM refers to.
            scheme: What the label map's integers mean.

        Returns:
            The files.
        """
        written = []
        if self.probabilities:
            written.append(found.save_probabilities(files.map("probabilities")))
        for kind in MAPS if self.uncertainty else ():
            written.append(found.save_uncertainty(files.map(kind), kind))
        if self.dicom_seg is not None:
            path, series = files.segmentation, case.series[0]
            self.dicom_seg.write(path, found.label_map, series, scheme)
            written.append(path)
        return written

    def is_done(self, case: InputCase, files: CaseFiles) -> bool:
        """Tell whether whole files of the scan's size are there."""
        if case.problem is not None:
            return False
        maps = [files.label_map]
        maps += [files.map("probabilities")] if self.probabilities else []
        maps += [files.map(kind) for kind in MAPS] if self.uncertainty else []
        others = [files.segmentation] if self.dicom_seg is not None else []
        if not all(path.is_file() for path in (*maps, *others)):
            return False
        try:
            first = case.series[0] if case.series else read_header(case.images[0])
            return all(read_header(path).shape == first.shape for path in maps)
        except SegMambaError:
            return False
