"""The manifest beside predictions, kept up to date case by case."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from segmamba.atomic import read_json, write_json
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, FormatError, describe
from segmamba.inference.find import InputCase
from segmamba.inference.prediction import Prediction
from segmamba.inference.predictor import Predictor
from segmamba.io import DicomSeries
from segmamba.manifest import Session, file_record, files_record
from segmamba.types import Array, JsonDict

_log = logging.getLogger(__name__)

_COMPARED = ("model", "options", "names")
"""What all predictions of a folder must have in common."""


@dataclass(frozen=True)
class CaseResult:
    """What became of one case."""

    id: str
    """The case."""
    status: Literal["done", "skipped", "failed"]
    """Skipped: its label map was there already."""
    images: tuple[Path, ...]
    """Its files."""
    output: Path | None = None
    """Its label map, unless it failed."""
    seconds: float = 0.0
    """Reading, prediction and writing together."""
    error: str | None = None
    """Why it failed."""
    facts: JsonDict = field(default_factory=dict)
    """What the manifest says of it beside that: inputs, outputs, shape, volumes ..."""


@dataclass
class PredictionRecord:
    """The manifest of a folder of predictions, or of a single one."""

    path: Path
    """The JSON file; rewritten whole after every case."""
    predictor: Predictor
    session: Session
    wanted: JsonDict
    """What is written beside label maps, for "options"."""
    cases: JsonDict = field(default_factory=dict)
    """Case id to what the manifest says of it."""
    model_files: list[JsonDict] = field(init=False)
    """Records of the model's files."""

    def __post_init__(self) -> None:
        files = self.predictor.identity.get("files", ())
        self.model_files = [file_record(Path(name)) for name in files]

    @classmethod
    def open(
        cls,
        path: Path,
        predictor: Predictor,
        session: Session,
        wanted: JsonDict,
        *,
        overwrite: bool,
    ) -> PredictionRecord:
        """Begin a manifest, or go on with the one that is there.

        Args:
            path: The JSON file.
            predictor: The model.
            session: The command's call.
            wanted: What is written beside label maps.
            overwrite: Begin anew.

        Returns:
            The record; it is written already.

        Raises:
            ConfigError: The manifest is of another model or of other options.
            FormatError: It can't be written.
        """
        record = cls(path, predictor, session, wanted)
        old = None if overwrite else _old_manifest(path)
        if old is not None:
            record._require_same(old)
            record.cases.update(old.get("cases", {}))
        record.write()
        return record

    def add(self, result: CaseResult) -> None:
        """Write down what became of a case.

        Raises:
            FormatError: The manifest can't be written.
        """
        if result.status == "skipped" and result.id in self.cases:
            return
        self.cases[result.id] = {
            "status": result.status,
            "error": result.error,
            "seconds": round(result.seconds, 3),
            "device": str(self.predictor.device),
            "precision": self.predictor.precision,
            **result.facts,
        }
        self.write()

    def write(self) -> None:
        """Write the manifest as it is now.

        Raises:
            FormatError: It can't be written.
        """
        try:
            write_json(self.path, self._data())
        except OSError as error:
            raise FormatError(
                describe(
                    "can't write to the folder of predictions",
                    found=error,
                    file=self.path.parent,
                    remedy="Make room, or choose a folder that you may write to.",
                )
            ) from error

    def _data(self) -> JsonDict:
        common = self._common()
        return {
            **self.session.describe(self.predictor.device),
            **common,
            "model": {**common["model"], "files": self.model_files},
            "wanted": self.wanted,
            "cases": self.cases,
        }

    def _common(self) -> JsonDict:
        identity = dict(self.predictor.identity)
        identity.pop("files", None)
        common = {
            "model": identity,
            "options": self.predictor.options,
            "names": list(self.predictor.names),
        }
        return json.loads(json.dumps(common))  # as it will be read back

    def _require_same(self, old: JsonDict) -> None:
        old = {**old, "model": dict(old.get("model", {}))}
        old["model"].pop("files", None)
        new = self._common()
        changed = [key for key in _COMPARED if key in old and old[key] != new[key]]
        if changed:
            raise ConfigError(
                describe(
                    "the folder holds predictions of another model or other options",
                    expected=", ".join(f"{key} {new[key]}" for key in changed),
                    found=", ".join(f"{key} {old[key]}" for key in changed),
                    file=self.path,
                    remedy="Use another folder, or --overwrite.",
                )
            )


def _old_manifest(path: Path) -> JsonDict | None:
    """Read the manifest that is there; one that is cut off counts as missing."""
    if not path.is_file():
        return None
    try:
        old = read_json(path)
        return old if isinstance(old, dict) else None
    except FormatError as error:
        text = "a manifest is lost, and a new one is begun; finished cases are kept: %s"
        _log.warning(text, error)
        return None


def describe_inputs(case: InputCase) -> JsonDict:
    """Tell a case's files from all others.

    Args:
        case: A case; its files may be missing.

    Returns:
        "inputs": a record for each image, or for each series of DICOM, in the order
        of the channels.
    """
    if not case.series:
        return {"inputs": [file_record(path) for path in case.images]}
    return {"inputs": [_series_record(series) for series in case.series]}


def _series_record(series: DicomSeries) -> JsonDict:
    paths = [file.path for file in series.files]
    alone = len(set(paths)) == 1
    files = file_record(paths[0]) if alone else files_record(series.source, paths)
    names = {name: getattr(series, name) for name in ("number", "description", "uid")}
    return {**files, "series": names}


def describe_prediction(found: Prediction, scheme: LabelScheme) -> JsonDict:
    """Give the facts of a label map: its grid, and the volume of each structure.

    Args:
        found: The prediction.
        scheme: What its integers mean.

    Returns:
        "shape", "spacing_mm" and "volumes_ml"; also "uncertainty" if it was wanted.
    """
    doubt = found.uncertainty
    return {
        **({} if doubt is None else {"uncertainty": doubt.describe()}),
        "shape": list(found.label_map.shape),
        "spacing_mm": [round(mm, 6) for mm in found.spacing_mm],
        "volumes_ml": volumes_ml(found, scheme),
    }


def volumes_ml(found: Prediction, scheme: LabelScheme) -> dict[str, float]:
    """Measure each label or region of a label map.

    Args:
        found: The prediction.
        scheme: What its integers mean.

    Returns:
        Name to millilitres.
    """
    voxel_ml = abs(float(np.linalg.det(found.affine[:3, :3]))) / 1000
    counts = _count_values(found.label_map)
    return {
        name: round(voxel_ml * sum(counts.get(value, 0) for value in set(group)), 6)
        for name, group in scheme.evaluated.items()
    }


def _count_values(label_map: Array) -> dict[int, int]:
    """Count each integer, plane by plane: all at once would take 8 bytes a voxel."""
    low, high = int(label_map.min(initial=0)), int(label_map.max(initial=0))
    total = np.zeros(high - low + 1, np.int64)
    for plane in label_map:
        total += np.bincount(plane.ravel().astype(np.int64) - low, minlength=len(total))
    return dict(enumerate(total.tolist(), start=low))


def describe_outputs(files: Sequence[Path], folder: Path) -> JsonDict:
    """Tell what was written from all other files.

    Args:
        files: What was written.
        folder: The manifest's; paths are relative to it.

    Returns:
        "outputs": a record for each file.
    """
    return {"outputs": [file_record(path, folder) for path in files]}
