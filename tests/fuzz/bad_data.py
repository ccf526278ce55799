"""Data sets whose files are sound one by one, and spoil training or scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bad_input import BadInput

from segmamba.data.check import check_dataset
from segmamba.errors import FormatError
from segmamba.io import Volume, write_label_map, write_volume

SHAPE = (6, 5, 4)
Change = Callable[[Path], object]


def image(path: Path, array: np.ndarray | None = None, seed: int = 0) -> None:
    if array is None:
        array = np.random.default_rng(seed).normal(size=(1, *SHAPE))
    write_volume(path, Volume(array.astype(np.float32), np.eye(4)))


def label(path: Path, values: tuple[float, ...] = (1,), shift: float = 0.0) -> None:
    labels = np.zeros(SHAPE, np.uint8 if all(v == int(v) for v in values) else float)
    labels.flat[: len(values)] = values
    affine = np.eye(4)
    affine[0, 3] = shift
    write_volume(path, Volume(labels[None], affine))


def pair(change: Change) -> Callable[[Path], Path]:
    """Two sound cases, then a change of them."""

    def made(folder: Path) -> Path:
        root = folder / "data"
        for index, name in enumerate("ab"):
            image(root / f"imagesTr/{name}.nii", seed=index)
            label(root / f"labelsTr/{name}.nii")
        cases = [
            {"image": f"imagesTr/{n}.nii", "label": f"labelsTr/{n}.nii"} for n in "ab"
        ]
        labels = {"0": "background", "1": "ball"}
        text = json.dumps(
            {"modality": {"0": "MRI"}, "labels": labels, "training": cases}
        )
        (root / "dataset.json").write_text(text)
        change(root)
        return root

    return made


def check(root: Path) -> None:
    """Raise what a report holds, as `segmamba check` shows it: kind and sentence."""
    report = check_dataset(root, workers=1)
    rows = [f"{p.file}: {p.kind}: {p.message}" for p in report.problems]
    if rows:
        raise FormatError("; ".join(rows) + ".")


def with_nan(root: Path) -> None:
    array = np.ones((1, *SHAPE))
    array[0, 0, 0, :2] = np.nan, np.inf
    array[0, 1] = 2
    image(root / "imagesTr/a.nii", array)


def copied(root: Path) -> None:
    image(root / "imagesTr/b.nii")


def header(root: Path, offset: int, values: list[float], kind: str = "<f4") -> None:
    path = root / "imagesTr/a.nii"
    data = bytearray(path.read_bytes())
    part = np.array(values, kind).tobytes()
    data[offset : offset + len(part)] = part
    path.write_bytes(data)


CHECKED = tuple(
    BadInput(f"check: {what}", pair(change), check)
    for what, change in (
        ("an image is missing", lambda root: (root / "imagesTr/a.nii").unlink()),
        ("a label map is missing", lambda root: (root / "labelsTr/a.nii").unlink()),
        (
            "a label map of another shape",
            lambda root: write_label_map(
                root / "labelsTr/a.nii", np.ones((6, 5, 3)), np.eye(4)
            ),
        ),
        (
            "a label map elsewhere",
            lambda root: label(root / "labelsTr/a.nii", shift=2.5),
        ),
        ("an unknown label", lambda root: label(root / "labelsTr/a.nii", (1, 7))),
        (
            "a label that is no integer",
            lambda root: label(root / "labelsTr/a.nii", (1, 0.5)),
        ),
        (
            "a label map of background only",
            lambda root: label(root / "labelsTr/a.nii", (0,)),
        ),
        ("NaN and infinity in an image", with_nan),
        (
            "an image of one value",
            lambda root: image(root / "imagesTr/a.nii", np.ones((1, *SHAPE))),
        ),
        (
            "too many channels",
            lambda root: image(
                root / "imagesTr/a.nii",
                np.random.default_rng(0).normal(size=(2, *SHAPE)),
            ),
        ),
        ("the same case twice", copied),
        (
            "an image without a label map",
            lambda root: image(root / "imagesTr/c.nii", seed=9),
        ),
        (
            "voxel sizes that contradict each other",
            lambda root: header(root, 80, [1, 1, 5]),
        ),
        ("sform and qform that differ", lambda root: header(root, 268, [9, 0, 0])),
    )
)
