"""NnU-Net v2 raw data: one numbered file per channel, labels in dataset.json."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts.decathlon import parse_channels
from segmamba.errors import ConfigError, FormatError, describe
from segmamba.io import SCAN_SUFFIXES
from segmamba.types import JsonDict

_IGNORE = "ignore"


def load_nnunet(path: Path, data: JsonDict) -> Dataset:
    """Read an nnU-Net v2 raw folder.

    Args:
        path: Its `dataset.json`.
        data: What the file holds: channel_names, labels (integers, or lists for
            regions with regions_class_order; "ignore" for voxels without annotation),
            file_ending, and perhaps `dataset` with the files of each case.

    Returns:
        The data set; `imagesTs` are its unlabelled cases.

    Raises:
        FormatError: Keys are missing or malformed, or there are no cases.
    """
    root = path.parent
    channels = parse_channels(data["channel_names"], path)
    ending = _file_ending(data, path)
    if data.get("dataset"):
        cases = _listed_cases(data["dataset"], root, path)
    else:
        cases = _found_cases(root, len(channels), ending)
    ids = sorted(_case_ids(root / "imagesTs", ending))
    unlabelled = [
        Case(id=name, images=_numbered(root / "imagesTs", name, len(channels), ending))
        for name in ids
    ]
    if not cases and not unlabelled:
        raise FormatError(
            describe(
                "a data set has no cases",
                expected=f"files such as imagesTr/case_0000{ending}",
                found="none",
                file=root,
                remedy="Check file_ending in dataset.json.",
            )
        )
    return Dataset(
        name=str(data.get("name") or root.resolve().name),
        root=root,
        layout="nnunet",
        channels=channels,
        labels=parse_nnunet_labels(data, path),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        unlabelled=tuple(unlabelled),
    )


def parse_nnunet_labels(data: JsonDict, path: Path) -> LabelScheme:
    """Read labels given as name to integer, or to a list of integers for a region.

    Args:
        data: A parsed `dataset.json`.
        path: The file, for errors.

    Returns:
        The label scheme: with regions if regions_class_order is there.

    Raises:
        FormatError: Labels are missing, malformed or contradict regions_class_order.
    """
    groups = _label_groups(data.get("labels"), path)
    ignored = groups.pop(_IGNORE, None)
    order = data.get("regions_class_order")
    united = [name for name, group in groups.items() if len(group) > 1]
    if order is None and united:
        raise FormatError(
            describe(
                "regions have no order",
                expected="regions_class_order, one integer a region",
                found=f"none, while {united[0]!r} unites several labels",
                file=path,
            )
        )
    try:
        return _scheme(groups, order, ignored)
    except (ConfigError, TypeError, ValueError) as error:
        raise FormatError(
            describe("labels are unusable", found=str(error), file=path)
        ) from error


def _scheme(
    groups: dict[str, tuple[int, ...]],
    order: list[int] | None,
    ignored: tuple[int, ...] | None,
) -> LabelScheme:
    ignore_label = None if ignored is None else ignored[0]
    if order is None:
        labels = {name: group[0] for name, group in groups.items()}
        return LabelScheme(labels=labels, ignore_label=ignore_label)
    regions = {name: group for name, group in groups.items() if group != (0,)}
    labels = {"background": 0}
    names = {group[0]: name for name, group in regions.items() if len(group) == 1}
    for value in sorted({value for group in regions.values() for value in group}):
        labels[names.get(value, f"label {value}")] = value
    return LabelScheme(
        labels=labels,
        regions=regions,
        regions_order=tuple(int(value) for value in order),
        ignore_label=ignore_label,
    )


def _label_groups(labels: Any, path: Path) -> dict[str, tuple[int, ...]]:
    try:
        groups = {
            str(name): tuple(
                int(item) for item in (value if isinstance(value, list) else [value])
            )
            for name, value in labels.items()
        }
    except (AttributeError, TypeError, ValueError):
        groups = {}
    if not groups or not all(groups.values()):
        raise FormatError(
            describe(
                "labels are malformed",
                expected='such as {"background": 0, "tumour": 1}',
                found=repr(labels)[:80],
                file=path,
            )
        )
    return groups


def _file_ending(data: JsonDict, path: Path) -> str:
    ending = str(data.get("file_ending", ".nii.gz"))
    if ending.lower() not in SCAN_SUFFIXES:
        raise FormatError(
            describe(
                "this file_ending can't be read",
                expected="one of " + ", ".join(SCAN_SUFFIXES),
                found=ending,
                file=path,
                remedy="Convert the images to NIfTI.",
            )
        )
    return ending


def _listed_cases(listed: Any, root: Path, path: Path) -> list[Case]:
    try:
        for item in listed.values():
            if not isinstance(item["images"], list) or not item["images"]:
                raise TypeError("images must be a list of paths")
        return [
            Case(
                id=str(name),
                images=tuple(root / PurePosixPath(file) for file in item["images"]),
                label=root / PurePosixPath(item["label"]),
            )
            for name, item in listed.items()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(
            describe(
                "the dataset key is malformed",
                expected='{"case": {"images": ["..."], "label": "..."}}',
                found=f"{type(error).__name__} ({error})",
                file=path,
            )
        ) from error


def _found_cases(root: Path, channels: int, ending: str) -> list[Case]:
    """Give every case that has an image or a label; check names what is missing."""
    labels = root / "labelsTr"
    ids = _case_ids(root / "imagesTr", ending)
    ids |= {name[: -len(ending)] for name in _names(labels, ending)}
    return [
        Case(
            id=name,
            images=_numbered(root / "imagesTr", name, channels, ending),
            label=labels / f"{name}{ending}",
        )
        for name in ids
    ]


def _numbered(folder: Path, name: str, channels: int, ending: str) -> tuple[Path, ...]:
    return tuple(folder / f"{name}_{index:04d}{ending}" for index in range(channels))


def _case_ids(folder: Path, ending: str) -> set[str]:
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    matches = [pattern.fullmatch(name) for name in _names(folder, ending)]
    return {match.group(1) for match in matches if match}


def _names(folder: Path, ending: str) -> list[str]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir()]
    return [name for name in names if name.endswith(ending) and name[0] != "."]
