"""BraTS challenge folders: a folder per case, contrasts and label told by the name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts.label_values import read_label_values
from segmamba.errors import SegMambaError

CHANNELS = ("t1n", "t1c", "t2w", "t2f")
"""Channel order for all years, whatever the files are called: native T1, T1 with
contrast agent, T2, FLAIR."""

_OLD_KINDS = ("t1", "t1ce", "t2", "flair")
_NEW_KINDS = CHANNELS
_NAME = re.compile(
    r"(?P<stem>.*[_-])(?P<kind>t1ce|t1n|t1c|t1|t2w|t2f|t2|flair|seg)"
    r"(?P<ending>\.nii(\.gz)?)",
    re.IGNORECASE,
)
_DEEPEST = 3
_ENOUGH_LABELS = 32


@dataclass(frozen=True)
class CaseFolder:
    """The BraTS files of one case."""

    id: str
    folder: Path
    stem: str
    ending: str
    files: dict[str, Path]
    """Contrast (or "seg") in small letters to file."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the four contrasts in this case's naming scheme."""
        new = sum(kind in self.files for kind in _NEW_KINDS)
        old = sum(kind in self.files for kind in _OLD_KINDS)
        return _NEW_KINDS if new >= old else _OLD_KINDS


def find_case_folders(root: Path) -> list[CaseFolder]:
    """Look for BraTS cases in a folder and three levels below.

    Args:
        root: A folder, such as one with HGG and LGG, or a single case.

    Returns:
        The cases sorted by folder; none unless some case has two contrasts or more.
    """
    found = [case for folder in _folders(root) for case in _cases_in(folder)]
    contrasts = [sum(kind in case.kinds for kind in case.files) for case in found]
    if max(contrasts, default=0) < 2:
        return []
    return sorted(found, key=lambda case: (case.folder, case.id))


def load_brats(root: Path, case_folders: Sequence[CaseFolder]) -> Dataset:
    """Make a data set of BraTS case folders.

    Args:
        root: The folder that holds them all.
        case_folders: What `find_case_folders` found.

    Returns:
        The data set, region-based (WT, TC, ET, and RC where a resection cavity is
        labelled). Cases without a label map are unlabelled.
    """
    cases = [_case(item) for item in case_folders]
    labelled = tuple(
        sorted((case for case in cases if case.label), key=lambda case: case.id)
    )
    num_old = sum(item.kinds == _OLD_KINDS for item in case_folders)
    enhancing, cavity = find_enhancing_value(
        [case.label for case in labelled if case.label],
        old_names=2 * num_old > len(case_folders),
    )
    return Dataset(
        name=root.resolve().name,
        root=root,
        layout="brats",
        channels=CHANNELS,
        labels=brats_labels(enhancing, cavity),
        cases=labelled,
        unlabelled=tuple(
            sorted((case for case in cases if not case.label), key=lambda case: case.id)
        ),
    )


def brats_labels(enhancing: int = 3, cavity: int | None = None) -> LabelScheme:
    """Give the labels and regions of BraTS.

    Args:
        enhancing: Integer of the enhancing tumour: 4 until 2021, 3 since 2023.
        cavity: Integer of the resection cavity (2024), or None.

    Returns:
        The label scheme. Predictions are written WT as 2 first, then TC as 1 and ET
        over it, so that what is left of each has its own label.
    """
    labels = {"background": 0, "NCR": 1, "ED": 2, "ET": enhancing}
    regions = {"WT": (1, 2, enhancing), "TC": (1, enhancing), "ET": (enhancing,)}
    order = [2, 1, enhancing]
    if cavity is not None:
        labels["RC"] = cavity
        regions["RC"] = (cavity,)
        order.append(cavity)
    return LabelScheme(labels=labels, regions=regions, regions_order=tuple(order))


def find_enhancing_value(
    labels: Sequence[Path], *, old_names: bool
) -> tuple[int, int | None]:
    """Tell from the label maps which integer is the enhancing tumour.

    Looks at 32 label maps spread over the data set, and goes on only while no
    enhancing tumour was seen: many cases have none.

    Args:
        labels: Label maps; broken ones are passed over.
        old_names: Whether files are named as until 2021, which decides where the label
            maps don't.

    Returns:
        The integer of the enhancing tumour, and that of the resection cavity or None.
    """
    seen: set[int] = set()
    together = False
    for count, path in enumerate(_spread(labels)):
        if together or (count >= _ENOUGH_LABELS and seen & ({4} if old_names else {3})):
            break
        values = _values_or_none(path)
        seen |= values
        together = {3, 4} <= values
    if together or (3 in seen and 4 in seen and not old_names):
        return 3, 4
    if 4 in seen:
        return 4, None
    return (3, None) if 3 in seen or not old_names else (4, None)


def _spread(paths: Sequence[Path]) -> list[Path]:
    """Order paths so that the first ones come from all over the list."""
    step = max(1, len(paths) // _ENOUGH_LABELS)
    return [path for start in range(step) for path in paths[start::step]]


def _values_or_none(path: Path) -> set[int]:
    try:
        return read_label_values(path)
    except SegMambaError:
        return set()


def _folders(root: Path, depth: int = 0) -> list[Path]:
    below: list[Path] = []
    if depth < _DEEPEST:
        try:
            inner = [entry for entry in root.iterdir() if entry.is_dir()]
        except OSError:
            inner = []
        for folder in inner:
            if not folder.name.startswith("."):
                below += _folders(folder, depth + 1)
    return [root, *below]


def _cases_in(folder: Path) -> list[CaseFolder]:
    """Give the case of a folder, or the cases where several lie in it together."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
    groups: defaultdict[str, list[re.Match[str]]] = defaultdict(list)
    for name in names:
        match = _NAME.fullmatch(name)
        if match and not name.startswith("."):
            groups[match["stem"]].append(match)
    contrasts = {
        stem: sum(match["kind"].lower() != "seg" for match in group)
        for stem, group in groups.items()
    }
    most = max(contrasts.values(), default=0)
    # A stem with a single contrast beside complete cases is a misnamed file.
    stems = [stem for stem, count in contrasts.items() if count >= min(most, 2) > 0]
    return [
        CaseFolder(
            id=folder.resolve().name if len(stems) == 1 else stem.rstrip("_-"),
            folder=folder,
            stem=stem,
            ending=groups[stem][0]["ending"],
            files={m["kind"].lower(): folder / m.string for m in groups[stem]},
        )
        for stem in stems
    ]


def _case(item: CaseFolder) -> Case:
    """Give the case; a missing contrast keeps the path where it should be."""
    return Case(
        id=item.id,
        images=tuple(
            item.files.get(kind, item.folder / f"{item.stem}{kind}{item.ending}")
            for kind in item.kinds
        ),
        label=item.files.get("seg"),
    )
