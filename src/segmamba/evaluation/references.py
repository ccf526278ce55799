"""Which files belong together, and what their integers mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts import load_dataset
from segmamba.errors import FormatError, describe
from segmamba.io import is_scan, strip_suffix

_SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """A prediction and the reference to compare it with."""

    id: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class Pairing:
    """All pairs of an evaluation, and what was left over."""

    pairs: tuple[Pair, ...]
    labels: LabelScheme | None
    """From the references, if they are a data set."""
    references_alone: tuple[str, ...]
    """References that have no prediction."""
    predictions_alone: tuple[str, ...]
    """Predictions that have no reference."""
    images: dict[str, Case]
    """Case ids to images, if the references are a data set."""


def pair_files(
    predictions: Path | str,
    references: Path | str | Dataset,
    *,
    allow_missing: bool | None = None,
) -> Pairing:
    """Match predictions and references by their case ids.

    Args:
        predictions: A folder of label maps named by case, or one label map.
        references: The same, or a data set in any layout.
        allow_missing: Whether references may lack a prediction; None allows it for
            a data set, of which often only a part is predicted.

    Returns:
        The pairs, sorted by id.

    Raises:
        FormatError: A folder is missing or has no label maps, or several of one case;
            nothing matches; or a reference lacks its prediction.
    """
    predicted = _label_maps(Path(predictions), "predictions")
    known, dataset = _known(references)
    if len(predicted) == len(known) == 1 and Path(predictions).is_file():
        known = dict(zip(predicted, known.values(), strict=True))
    both = sorted(set(predicted) & set(known))
    alone = tuple(sorted(set(known) - set(predicted)))
    if not both:
        raise FormatError(_nothing_matches(predictions, predicted, known))
    is_dataset = dataset is not None
    if alone and not (is_dataset if allow_missing is None else allow_missing):
        raise FormatError(
            describe(
                f"{len(alone)} references have no prediction",
                expected="one label map a case",
                found=f"none for {_some(alone)}",
                file=predictions,
                remedy="Predict them, or leave their references out.",
            )
        )
    return Pairing(
        pairs=tuple(Pair(name, predicted[name], known[name]) for name in both),
        labels=None if dataset is None else dataset.labels,
        references_alone=alone,
        predictions_alone=tuple(sorted(set(predicted) - set(known))),
        images={case.id: case for case in dataset.cases} if dataset else {},
    )


def _known(
    references: Path | str | Dataset,
) -> tuple[dict[str, Path], Dataset | None]:
    """Case ids to label maps, and the data set if it is more than a folder of them."""
    if not isinstance(references, Dataset):
        path = Path(references)
        if (path.is_file() and is_scan(path)) or _is_plain_folder(path):
            return _label_maps(path, "references"), None
        references = load_dataset(path)
    labelled = [case for case in references.cases if case.label is not None]
    return {case.id: Path(str(case.label)) for case in labelled}, references


def _is_plain_folder(path: Path) -> bool:
    if not path.is_dir() or (path / "dataset.json").exists():
        return False
    return any(is_scan(file) for file in path.iterdir())


def _label_maps(path: Path, what: str) -> dict[str, Path]:
    """Case ids to the scans that lie directly in a folder."""
    if path.is_file():
        return {_case_id(path): path}
    files = sorted(path.iterdir()) if path.is_dir() else []
    # Of case and case-seg, the latter is the label map: it comes last, and stays.
    scans = sorted(filter(is_scan, files), key=_ends_in_seg)
    found = {_case_id(file): file for file in scans}
    for file in scans:
        _require_one(file, found[_case_id(file)], what)
    if not found:
        raise FormatError(
            describe(
                f"no {what}",
                expected="a folder with label maps (.nii.gz, .nii, .nrrd, .mha)",
                found="no such folder" if not path.exists() else "none in it",
                file=path,
            )
        )
    return found


def _require_one(file: Path, chosen: Path, what: str) -> None:
    """Refuse to choose between files such as case.nii and case.nii.gz."""
    if file != chosen and _ends_in_seg(file) == _ends_in_seg(chosen):
        raise FormatError(
            describe(
                f"two files are {what} of one case",
                expected="one label map a case",
                found=f"{file.name} and {chosen.name}",
                file=file.parent,
                remedy="Move one of them away.",
            )
        )


def _ends_in_seg(path: Path) -> bool:
    return strip_suffix(path) != _case_id(path)


def _case_id(path: Path) -> str:
    """Name without ending; BraTS's label maps end in -seg or _seg."""
    return re.sub(r"[-_]seg$", "", strip_suffix(path))


def _nothing_matches(
    predictions: Path | str, predicted: dict[str, Path], known: dict[str, Path]
) -> str:
    return describe(
        "no prediction has a reference of the same name",
        expected=f"names such as {_some(sorted(known))}",
        found=_some(sorted(predicted)),
        file=predictions,
        remedy="Name each label map by its case.",
    )


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
