"""A CSV with one case a row: columns image (or image_0, ...), label, frame, id."""

from __future__ import annotations

import csv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from segmamba.atomic import read_json
from segmamba.data.dataset import Case, Dataset
from segmamba.data.labels import LabelScheme
from segmamba.data.layouts.decathlon import parse_channels, parse_decathlon_labels
from segmamba.data.layouts.label_values import read_label_values
from segmamba.data.layouts.nnunet import parse_nnunet_labels
from segmamba.errors import FormatError, SegMambaError, describe
from segmamba.io import read_header, strip_suffix
from segmamba.types import JsonDict

_IMAGE, _LABEL, _ID, _FRAME = "image", "label", "id", "frame"
_MOST_LABELS = 256


def find_tables(folder: Path) -> list[Path]:
    """Look for CSV files that list images.

    Args:
        folder: Where to look; not below it.

    Returns:
        The files whose first line has a column image or image_..., sorted.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError:
        return []
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    return [file for file in tables if file.name[0] != "." and _lists_images(file)]


def load_table(path: Path) -> Dataset:
    """Read a data set from a CSV.

    Args:
        path: The file. Columns: `id` (optional), `image` or several whose names begin
            with image, `label` (optional), and `frame` (optional): which of a 4D
            image's frames is the case, from 0. Paths are relative to the file. A
            `dataset.json` beside it may give labels and channel_names; otherwise labels
            are the integers found in all label maps.

    Returns:
        The data set; rows without a label are its unlabelled cases.

    Raises:
        FormatError: There is no image column, no row, a column twice, or the labels
            can't be told.
    """
    header, rows = _read_rows(path)
    columns = [name for name in header if name.lower().startswith(_IMAGE)]
    label_column, id_column, frame_column = (
        next((name for name in header if name.lower() == wanted), None)
        for wanted in (_LABEL, _ID, _FRAME)
    )
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        raise _bad(path, "each column once", f"{', '.join(twice)} again")
    if not columns:
        found = ", ".join(filter(None, header)) or "no column at all"
        raise _bad(path, "a column image, or image_0, image_1, ...", found)
    if not rows:
        raise _bad(path, "one row a case", "no rows")
    files = [_row_files(row, columns, path) for row in rows]
    frames = [_frame(row, frame_column, path) for row in rows]
    given = [row.get(id_column, "") if id_column else "" for row in rows]
    names = _case_ids(given, files, frames, path.parent)
    cases = [
        Case(name, images, _cell(row, label_column, path.parent), frame)
        for name, images, row, frame in zip(names, files, rows, frames, strict=True)
    ]
    labelled = [case for case in cases if case.label is not None]
    description = _description(path)
    return Dataset(
        name=path.stem,
        root=path.parent,
        layout="csv",
        channels=_channels(columns, cases, description, path),
        labels=_labels(labelled, description, path),
        cases=tuple(sorted(labelled, key=lambda case: case.id)),
        unlabelled=tuple(
            sorted((case for case in cases if not case.label), key=lambda case: case.id)
        ),
    )


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, "a readable UTF-8 file", str(error)) from error
    lines = [line for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    table = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    header = [name.strip() for name in table[0]] if table else []
    rows = []
    for number, cells in enumerate(table[1:], start=2):
        if len(cells) > len(header):
            found = f"{len(cells)} in row {number}"
            raise _bad(path, f"{len(header)} cells a row", found)
        padded = [*cells, *[""] * (len(header) - len(cells))]
        rows.append({k: v.strip() for k, v in zip(header, padded, strict=True)})
    return header, rows


def _lists_images(path: Path) -> bool:
    try:
        header, _ = _read_rows(path)
    except FormatError:
        return False
    return any(name.lower().startswith(_IMAGE) for name in header)


def _row_files(row: dict[str, str], columns: list[str], path: Path) -> tuple[Path, ...]:
    """Give a row's image files; an empty cell keeps a path that check will name."""
    first = next((row[name] for name in columns if row[name]), None)
    if first is None:
        raise _bad(path, "an image in every row", f"none in {row}")
    return tuple(
        path.parent / PurePosixPath(row[name] or f"(no {name} beside {first})")
        for name in columns
    )


def _cell(row: dict[str, str], column: str | None, folder: Path) -> Path | None:
    text = row[column] if column else ""
    return folder / PurePosixPath(text) if text else None


def _frame(row: dict[str, str], column: str | None, path: Path) -> int | None:
    text = row[column] if column else ""
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _bad(path, "whole numbers from 0 up in the column frame", repr(text))
    return int(text) if text else None


def _case_ids(
    given: list[str],
    files: list[tuple[Path, ...]],
    frames: list[int | None],
    folder: Path,
) -> list[str]:
    """Take the ids given, else file names, else whole paths where names repeat."""
    ends = ["" if frame is None else f"_frame_{frame}" for frame in frames]
    pairs = list(zip(files, ends, strict=True))
    stems = [strip_suffix(images[0]) + end for images, end in pairs]
    if max(Counter(stems).values()) > 1:
        stems = [_path_id(images[0], folder) + end for images, end in pairs]
    return [name or stem for name, stem in zip(given, stems, strict=True)]


def _path_id(file: Path, root: Path) -> str:
    inside = file.relative_to(root) if file.is_relative_to(root) else file
    folders = [part for part in inside.parts[:-1] if part not in ("..", file.anchor)]
    return "_".join([*folders, strip_suffix(file)]).lstrip(".")


def _description(path: Path) -> JsonDict:
    file = path.parent / "dataset.json"
    data = read_json(file) if file.is_file() else {}
    return data if isinstance(data, dict) else {}


def _channels(
    columns: list[str], cases: list[Case], description: JsonDict, path: Path
) -> tuple[str, ...]:
    named = description.get("channel_names", description.get("modality"))
    if named is not None:
        return parse_channels(named, path.parent / "dataset.json")
    if len(columns) > 1:
        return tuple(name[len(_IMAGE) :].lstrip("_- ") or name for name in columns)
    count = _channels_in_first_file(cases)
    return (_IMAGE,) if count == 1 else tuple(str(index) for index in range(count))


def _channels_in_first_file(cases: list[Case]) -> int:
    for case in cases:
        try:
            header = read_header(case.images[0])
            return header.channels if case.frame is None else 1
        except SegMambaError:
            continue
    return 1


def _labels(cases: list[Case], description: JsonDict, path: Path) -> LabelScheme:
    file = path.parent / "dataset.json"
    listed = description.get("labels")
    if isinstance(listed, dict) and listed:
        if all(str(key).isdigit() for key in listed):
            return parse_decathlon_labels(description, file)
        return parse_nnunet_labels(description, file)
    with ThreadPoolExecutor() as pool:
        found = pool.map(_values_or_none, [case.label for case in cases if case.label])
        values = sorted(set().union(*found) - {0})
    if len(values) > _MOST_LABELS or (values and values[0] < 0):
        span = f"{len(values)} values from {values[0]} to {values[-1]}"
        raise _bad(path, "label maps of a few integers from 0 up", span)
    return LabelScheme(
        labels={"background": 0, **{f"label {value}": value for value in values}}
    )


def _values_or_none(path: Path) -> set[int]:
    try:
        return read_label_values(path)
    except SegMambaError:
        return set()


def _bad(path: Path, expected: str, found: str) -> FormatError:
    return FormatError(
        describe(
            "can't use a table of cases",
            expected=expected,
            found=found,
            file=path,
            remedy="See docs/how-to/your-data.md for the columns.",
        )
    )
