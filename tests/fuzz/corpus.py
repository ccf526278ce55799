"""All kinds of bad input, and the page of the docs that shows them."""

from __future__ import annotations

from pathlib import Path

from bad_data import CHECKED
from bad_dicom import ARCHIVES, DICOM
from bad_input import BadInput
from bad_scans import SCANS
from bad_texts import CHECKPOINTS, DATA, PLANS, SETTINGS

GROUPS: dict[str, tuple[BadInput, ...]] = {
    "Scans": SCANS,
    "DICOM": DICOM,
    "Archives": ARCHIVES,
    "Data sets and splits": DATA,
    "Found by `segmamba check`": CHECKED,
    "Settings": SETTINGS,
    "Plans": PLANS,
    "Checkpoints and weights": CHECKPOINTS,
}

HEAD = """# Errors

What is refused, and in which words. Each row is an input of the tests; paths are shown
short. On the command line an error is this text behind `error: `, and the exit code 1.

This page is written by `python benchmarks/error_page.py`.
"""


def page(texts: dict[str, str]) -> str:
    """Compose the page.

    Args:
        texts: The error of each kind by what it is, fit for a table.

    Returns:
        Markdown.
    """
    parts = [HEAD]
    for title, group in GROUPS.items():
        parts.append(f"\n## {title}\n\n| what is wrong | error |\n| --- | --- |\n")
        parts += [f"| {item.what} | {texts[item.what]} |\n" for item in group]
    return "".join(parts)


def rows(text: str) -> dict[str, str]:
    """Read the table's rows back: what is wrong, and the cell of its error."""
    cells = [
        line[2:-2].split(" | ", 1) for line in text.splitlines() if line[:2] == "| "
    ]
    return {
        what: error for what, error in cells if what not in ("what is wrong", "---")
    }


def make_texts(folder: Path) -> dict[str, str]:
    """Make every kind of bad input below a folder, and give the errors' texts."""
    texts = {}
    for number, item in enumerate(item for group in GROUPS.values() for item in group):
        place = folder / str(number)
        place.mkdir()
        texts[item.what] = cell(item.text(place))
    return texts


def cell(text: str) -> str:
    """Make a text fit for a cell of a table."""
    line = " ".join(text.split())
    return line.replace("|", "\\|").replace("<", "&lt;")
