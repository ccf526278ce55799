"""Medical Segmentation Decathlon: dataset.json lists pairs of image and label."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.errors import FormatError, describe
from segmamba.io import SCAN_SUFFIXES, strip_suffix
from segmamba.types import JsonDict


def load_decathlon(path: Path, data: JsonDict) -> Dataset:
    """Read a Decathlon folder, or one that nnU-Net v1 made from it.

    Args:
        path: Its `dataset.json`.
        data: What the file holds.

    Returns:
        The data set; test images are its unlabelled cases.

    Raises:
        FormatError: Labels or the list of cases are missing or malformed.
    """
    root = path.parent
    channels = parse_channels(data.get("modality", {"0": "image"}), path)
    cases = [
        _training_case(item, root, len(channels), path)
        for item in _listed(data, "training", path)
    ]
    unlabelled = [
        _test_case(item, root, len(channels), path)
        for item in _listed(data, "test", path)
    ]
    if not cases and not unlabelled:
        raise FormatError(
            describe(
                "a data set lists no cases",
                expected="pairs of image and label under training",
                found="none",
                file=path,
            )
        )
    return Dataset(
        name=str(data.get("name") or root.resolve().name),
        root=root,
        layout="msd",
        channels=channels,
        labels=parse_decathlon_labels(data, path),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        unlabelled=tuple(sorted(unlabelled, key=lambda case: case.id)),
    )


def parse_channels(names: Any, path: Path) -> tuple[str, ...]:
    """Read channel names keyed by number, or listed.

    Args:
        names: Such as {"0": "FLAIR", "1": "T1w"} or ["FLAIR", "T1w"].
        path: The file, for errors.

    Returns:
        The names in the order of their numbers.

    Raises:
        FormatError: It is neither, or empty.
    """
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        ordered = sorted(names.items(), key=lambda item: int(item[0]))
    except (AttributeError, ValueError):
        ordered = []
    if not ordered:
        raise FormatError(
            describe(
                "channel names are malformed",
                expected='such as {"0": "T1"}',
                found=repr(names)[:60],
                file=path,
            )
        )
    return tuple(str(name) for _, name in ordered)


def parse_decathlon_labels(data: JsonDict, path: Path) -> LabelScheme:
    """Read labels given as integer to name.

    Args:
        data: A parsed `dataset.json`.
        path: The file, for errors.

    Returns:
        The label scheme; a background of 0 is added if it isn't listed.

    Raises:
        FormatError: There are none, or a key isn't an integer.
    """
    listed = data.get("labels")
    try:
        pairs = sorted((int(value), str(name)) for value, name in listed.items())  # type: ignore[union-attr]
    except (AttributeError, ValueError, TypeError) as error:
        raise FormatError(
            describe(
                "labels are malformed",
                expected='such as {"0": "background", "1": "tumour"}',
                found=repr(listed)[:80],
                file=path,
            )
        ) from error
    labels: dict[str, int] = {}
    if 0 not in [value for value, _ in pairs]:
        pairs.insert(0, (0, "background"))
    for value, name in pairs:
        labels[name if name not in labels else f"{name} {value}"] = value
    return LabelScheme(labels=labels)


def _listed(data: JsonDict, key: str, path: Path) -> list[Any]:
    items = data.get(key, [])
    if not isinstance(items, list):
        raise FormatError(
            describe(
                f"{key} is malformed",
                expected="a list",
                found=type(items).__name__,
                file=path,
            )
        )
    return items


def _training_case(item: Any, root: Path, channels: int, path: Path) -> Case:
    if not (
        isinstance(item, dict)
        and isinstance(item.get("image"), str)
        and isinstance(item.get("label"), str)
    ):
        raise FormatError(
            describe(
                "a training entry is malformed",
                expected='{"image": "...", "label": "..."}',
                found=repr(item)[:80],
                file=path,
            )
        )
    image = PurePosixPath(item["image"])
    return Case(
        id=strip_suffix(item["label"]),
        images=_image_files(root / image, channels),
        label=root / PurePosixPath(item["label"]),
    )


def _test_case(item: Any, root: Path, channels: int, path: Path) -> Case:
    name = item.get("image") if isinstance(item, dict) else item
    if not isinstance(name, str):
        raise FormatError(
            describe(
                "a test entry is malformed",
                expected="a path",
                found=repr(item)[:80],
                file=path,
            )
        )
    files = _image_files(root / PurePosixPath(name), channels)
    return Case(id=strip_suffix(name), images=files)


def _image_files(image: Path, channels: int) -> tuple[Path, ...]:
    """Give the listed file, or nnU-Net v1's one file per channel in its stead."""
    if _is_there(image):
        return (image,)
    stem = strip_suffix(image)
    for suffix in SCAN_SUFFIXES:
        numbered = [
            image.with_name(f"{stem}_{index:04d}{suffix}") for index in range(channels)
        ]
        if any(map(_is_there, numbered)):
            return tuple(numbered)
    return (image,)


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # such as a name that is too long
        return False
