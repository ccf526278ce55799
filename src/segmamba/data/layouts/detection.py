"""Tell a data set's layout from what lies in its folder."""

from __future__ import annotations

from pathlib import Path

from segmamba.atomic import read_json
from segmamba.data.dataset import (
    Dataset,
    dataset_from_dict,
    is_dataset_dict,
    labels_from_dict,
)
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts.brats import find_case_folders, load_brats
from segmamba.data.layouts.decathlon import load_decathlon, parse_decathlon_labels
from segmamba.data.layouts.nnunet import load_nnunet, parse_nnunet_labels
from segmamba.data.layouts.table import find_tables, load_table
from segmamba.errors import FormatError, describe
from segmamba.types import JsonDict

LAYOUTS = (
    "a Medical Segmentation Decathlon folder (dataset.json with modality and training)",
    "an nnU-Net v2 folder (dataset.json with channel_names, imagesTr, labelsTr)",
    "BraTS case folders (files such as *_t1ce.nii.gz or *-t1c.nii.gz)",
    "a CSV with columns image (or image_0, image_1, ...) and label",
)
"""The layouts that `load_dataset` understands, in words."""


def load_dataset(path: Path | str) -> Dataset:
    """Read what a data set consists of; no file is copied, renamed or changed.

    Args:
        path: Its folder, its `dataset.json`, or its CSV. Layouts: Medical Segmentation
            Decathlon, nnU-Net v2 raw, BraTS 2018 to 2024, CSV.

    Returns:
        The data set. Files that are listed but missing keep their paths, so that
        `check_dataset` can name them.

    Raises:
        FormatError: Nothing of the kind is there; the text says what was found.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FormatError(
            describe(
                "a data set is missing",
                expected="a folder, a dataset.json or a CSV",
                found="nothing",
                file=path,
                remedy="Check the path.",
            )
        )
    if path.suffix.lower() == ".json":
        return _load_json(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return load_table(path)
    raise _unrecognised(path, f"a {path.suffix or 'nameless'} file")


def load_label_scheme(path: Path | str) -> LabelScheme:
    """Read what the integers of label maps mean.

    Args:
        path: A data set, or a `dataset.json` of any layout; for the latter no other
            file needs to be there.

    Returns:
        The label scheme.

    Raises:
        FormatError: The file is no description of labels.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() != ".json":
        return load_dataset(path).labels
    data = read_description(path)
    if is_dataset_dict(data):
        return dataset_from_dict(data, source=path).labels
    if isinstance(data.get("labels"), dict) and "labels" in data["labels"]:
        return labels_from_dict(data["labels"], source=path)
    if _is_nnunet(data) or "modality" not in data:
        return parse_nnunet_or_decathlon(data, path)
    return parse_decathlon_labels(data, path)


def parse_nnunet_or_decathlon(data: JsonDict, path: Path) -> LabelScheme:
    """Read labels of either notation: name to integer, or integer to name.

    Args:
        data: A parsed `dataset.json`.
        path: The file, for errors.

    Returns:
        The label scheme.

    Raises:
        FormatError: There are no labels, or they are neither notation.
    """
    labels = data.get("labels")
    if isinstance(labels, dict) and all(str(key).isdigit() for key in labels):
        return parse_decathlon_labels(data, path)
    return parse_nnunet_labels(data, path)


def read_description(path: Path) -> JsonDict:
    """Read a `dataset.json`.

    Args:
        path: The file.

    Returns:
        Its mapping.

    Raises:
        FormatError: It isn't JSON, or not a mapping.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise FormatError(
            describe(
                "a dataset.json is not a mapping",
                expected="keys such as labels and training",
                found=type(data).__name__,
                file=path,
            )
        )
    return data


def _load_folder(folder: Path) -> Dataset:
    description = folder / "dataset.json"
    if description.is_file():
        data = read_description(description)
        if is_dataset_dict(data) or _is_nnunet(data) or _is_decathlon(data):
            return _load_json(description)
    if case_folders := find_case_folders(folder):
        return load_brats(folder, case_folders)
    tables = find_tables(folder)
    if len(tables) == 1:
        return load_table(tables[0])
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise _unrecognised(folder, f"several tables ({names})")
    raise _unrecognised(folder, _describe_folder(folder))


def _load_json(path: Path) -> Dataset:
    data = read_description(path)
    if is_dataset_dict(data):
        return dataset_from_dict(data, source=path)
    if _is_nnunet(data):
        return load_nnunet(path, data)
    if _is_decathlon(data):
        return load_decathlon(path, data)
    keys = ", ".join(sorted(map(str, data))[:8]) or "no keys"
    raise _unrecognised(path, f"a JSON file with {keys}")


def _is_nnunet(data: JsonDict) -> bool:
    return "channel_names" in data


def _is_decathlon(data: JsonDict) -> bool:
    return "training" in data


def _describe_folder(folder: Path) -> str:
    """Say in a few words what a folder holds."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return f"an unreadable folder ({error.strerror})"
    if not entries:
        return "an empty folder"
    names = ", ".join(
        entry.name + ("/" if entry.is_dir() else "") for entry in entries[:5]
    )
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return names + more


def _unrecognised(path: Path, found: str) -> FormatError:
    return FormatError(
        describe(
            "can't recognise a data set",
            expected="one of: " + "; ".join(LAYOUTS),
            found=found,
            file=path,
            remedy="See docs/how-to/your-data.md, or list the files in a CSV.",
        )
    )
