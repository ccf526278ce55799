"""What is written beside label maps, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segmamba.atomic import remove_leftovers
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, SegMambaError, describe
from segmamba.inference.dicom_study import SegOutput
from segmamba.inference.find import InputCase
from segmamba.inference.prediction import Prediction
from segmamba.inference.uncertainty import MAPS
from segmamba.io import is_whole, read_header, strip_suffix
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

    def dicom(self, output: SegOutput) -> Path:
        """Name a DICOM-SEG, <case>.dcm, or RTSTRUCT, <case>_rtstruct.dcm."""
        ending = "_rtstruct.dcm" if output.kind == "RTSTRUCT" else ".dcm"
        return self.label_map.with_name(strip_suffix(self.label_map) + ending)


@dataclass(frozen=True)
class Extras:
    """What is written beside each label map."""

    probabilities: bool = False
    """Softmax or sigmoid maps."""
    uncertainty: bool = False
    """Maps of entropy, mutual information and confidence."""
    dicom: tuple[SegOutput, ...] = ()
    """DICOM-SEG and RTSTRUCT, for scans that are DICOM."""

    def describe(self) -> JsonDict:
        """Give what was wanted, for the manifest."""
        return {
            "probabilities": self.probabilities,
            "uncertainty": self.uncertainty,
            "dicom": [output.kind for output in self.dicom],
        }

    def check(self, cases: Sequence[InputCase], scheme: LabelScheme) -> None:
        """Find out before anything is computed what can't be written.

        Raises:
            ConfigError: DICOM is wanted of scans that are none, or a description of
                segments fits no label.
            BackendUnavailableError: What writes DICOM isn't installed.
        """
        others = [case for case in cases if not case.series and case.problem is None]
        if others and self.dicom:
            raise ConfigError(
                describe(
                    "only what was DICOM can be written as DICOM",
                    expected="a folder or archive of DICOM series",
                    found=f"case {others[0].id}",
                    file=others[0].images[0] if others[0].images else None,
                    remedy="Leave out --dicom-seg and --rtstruct.",
                )
            )
        for output in self.dicom:
            output.check(scheme)

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
        for output in self.dicom:
            written.append(files.dicom(output))
            output.write(written[-1], found.label_map, case.series[0], scheme)
        return written

    def clean(self, folder: Path) -> None:
        """Remove what a killed prediction left half-written beside label maps."""
        for kind in ("probabilities", *MAPS):
            remove_leftovers(folder / kind)

    def is_done(self, case: InputCase, files: CaseFiles) -> bool:
        """Tell whether whole files of the scan's size are there."""
        if case.problem is not None:
            return False
        maps = [files.label_map]
        maps += [files.map("probabilities")] if self.probabilities else []
        maps += [files.map(kind) for kind in MAPS] if self.uncertainty else []
        others = [files.dicom(output) for output in self.dicom]
        if not all(is_whole(path) for path in (*maps, *others)):
            return False
        try:
            first = case.series[0] if case.series else read_header(case.images[0])
            return all(read_header(path).shape == first.shape for path in maps)
        except SegMambaError:
            return False
