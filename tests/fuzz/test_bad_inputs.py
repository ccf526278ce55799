"""Every kind of bad input is refused in the words that the docs show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bad_input import BadInput
from corpus import GROUPS, cell, page, rows

KINDS = [item for group in GROUPS.values() for item in group]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"
REMEDY = "run benchmarks/error_page.py"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="words of POSIX systems")


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    return rows(PAGE.read_text(encoding="utf-8"))


def test_the_page_shows_each_kind_once_and_nothing_else(shown: dict[str, str]) -> None:
    names = [item.what for item in KINDS]
    assert len(set(names)) == len(names) >= 60
    assert list(shown) == names, REMEDY
    assert page(shown) == PAGE.read_text(encoding="utf-8"), REMEDY


@pytest.mark.parametrize("item", KINDS, ids=lambda item: item.what)
def test_the_error_is_the_one_shown(
    shown: dict[str, str], tmp_path: Path, item: BadInput, capfd
) -> None:
    found, expected = cell(item.text(tmp_path)), shown[item.what]
    if item.foreign:  # a library's own words, which its versions change
        found, expected = (text.split("found ")[0] for text in (found, expected))
    assert found == expected, REMEDY
    assert "Traceback" not in found
    assert capfd.readouterr() == ("", ""), "errors are raised, not printed"
