"""A data set as it lies on disk: cases, channels, labels. Nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segmamba.data.labels import LabelScheme
from segmamba.errors import FormatError, describe
from segmamba.types import JsonDict


@dataclass(frozen=True)
class Case:
    """One subject's scan: its files, and its label map if there is one."""

    id: str
    """Unique in the data set, and the stem of what is written for the case."""
    images: tuple[Path, ...]
    """One file per channel, or a single file that holds all channels (4D)."""
    label: Path | None = None
    """The label map; None for a case that is only predicted."""
    frame: int | None = None
    """Which of the images' fourth axis is the case, from 0; None makes it channels."""


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

    def __post_init__(self) -> None:
        for case in (*self.cases, *self.unlabelled):
            name = case.id
            bad = any(sign in '/\\:*?"<>|' or sign < " " for sign in name)
            if not name or name[0] == "." or bad:
                raise FormatError(
                    describe(
                        "a case id can't be a file's name",
                        expected="letters, digits, and signs such as _ and -",
                        found=repr(name),
                        file=self.root,
                    )
                )


_FORMAT = "segmamba dataset 1"


def dataset_to_dict(dataset: Dataset) -> JsonDict:
    """Turn a data set into plain values, for `dataset.json` in a run's folder.

    Args:
        dataset: The data set.

    Returns:
        A JSON-able mapping; paths under the root are relative to it, with slashes.
    """
    scheme = dataset.labels
    return {
        "format": _FORMAT,
        "name": dataset.name,
        "root": str(dataset.root.resolve()),
        "layout": dataset.layout,
        "channels": list(dataset.channels),
        "labels": {
            "labels": dict(scheme.labels),
            "regions": {name: list(group) for name, group in scheme.regions.items()},
            "regions_order": list(scheme.regions_order),
            "ignore_label": scheme.ignore_label,
        },
        "cases": [_case_to_dict(case, dataset.root) for case in dataset.cases],
        "unlabelled": [
            _case_to_dict(case, dataset.root) for case in dataset.unlabelled
        ],
    }


def dataset_from_dict(
    data: JsonDict, *, source: Path | str = "dataset.json"
) -> Dataset:
    """Undo `dataset_to_dict`.

    Args:
        data: The mapping.
        source: The file it came from, for errors.

    Returns:
        The data set. No file is looked at.

    Raises:
        FormatError: A key is missing or holds something else.
    """
    try:
        root = Path(data["root"])
        return Dataset(
            name=str(data["name"]),
            root=root,
            layout=str(data["layout"]),
            channels=tuple(str(name) for name in data["channels"]),
            labels=_labels(data["labels"]),
            cases=tuple(_case_from_dict(item, root) for item in data["cases"]),
            unlabelled=tuple(
                _case_from_dict(item, root) for item in data.get("unlabelled", [])
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(error, source) from error


def is_dataset_dict(data: object) -> bool:
    """Tell whether a JSON value was made by `dataset_to_dict`."""
    return isinstance(data, dict) and data.get("format") == _FORMAT


def labels_from_dict(data: JsonDict, *, source: Path | str) -> LabelScheme:
    """Build a label scheme from its JSON form in `dataset_to_dict`.

    Args:
        data: A mapping with labels, regions, regions_order and ignore_label.
        source: The file it came from, for errors.

    Returns:
        The scheme.

    Raises:
        FormatError: `labels` is missing, holds something else, or contradicts itself.
    """
    try:
        return _labels(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(error, source) from error


def _labels(data: JsonDict) -> LabelScheme:
    ignored = data.get("ignore_label")
    return LabelScheme(
        labels={str(name): int(value) for name, value in data["labels"].items()},
        regions={
            str(name): tuple(int(value) for value in group)
            for name, group in data.get("regions", {}).items()
        },
        regions_order=tuple(int(value) for value in data.get("regions_order", ())),
        ignore_label=None if ignored is None else int(ignored),
    )


def _damaged(error: Exception, source: Path | str) -> FormatError:
    return FormatError(
        describe(
            "a data set's description is damaged",
            expected="what segmamba plan or train wrote",
            found=f"{type(error).__name__} ({error})",
            file=source,
            remedy="Delete it and run segmamba plan again.",
        )
    )


def _case_to_dict(case: Case, root: Path) -> JsonDict:
    frame = {} if case.frame is None else {"frame": case.frame}
    return {
        "id": case.id,
        "images": [_portable(path, root) for path in case.images],
        "label": None if case.label is None else _portable(case.label, root),
        **frame,
    }


def _case_from_dict(data: JsonDict, root: Path) -> Case:
    label, frame = data.get("label"), data.get("frame")
    return Case(
        id=str(data["id"]),
        images=tuple(root / path for path in data["images"]),
        label=None if label is None else root / label,
        frame=None if frame is None else int(frame),
    )


def _portable(path: Path, root: Path) -> str:
    """Give the path relative to the root where it lies under it, else absolute."""
    for base, file in ((root, path), (root.resolve(), path.absolute())):
        if file.is_relative_to(base):
            return file.relative_to(base).as_posix()
    return str(path.absolute())
