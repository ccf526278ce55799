"""Every code block and every segmamba command of the README and the docs runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from segmamba import cli
from segmamba.config import TrainConfig

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
SHORT = "--max-epochs 1"
"""What stands in for a training time."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run_command(line: str) -> None:
    words = shlex.split(re.sub(r"--max-time \S+", SHORT, line), comments=True)
    if not words or words[0] != "segmamba":
        return
    if words[1] == "train" and "--resume" not in words:
        shutil.rmtree("run", ignore_errors=True)  # a run is never overwritten
    assert cli.main(words[1:]) == 0, line


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page)],
    ids=lambda page: page.stem,
)
def test_blocks_run(
    page: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for language, text in blocks(page):
        if re.search(
            r"\bpredict(_cases)?\b", text
        ):  # a folder takes the predictions of one model
            shutil.rmtree("predictions", ignore_errors=True)
        if language == "bash":
            for line in text.splitlines():
                run_command(line)
        elif language == "python":
            exec(compile(text, str(page), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_figures_are_those_measured() -> None:
    path = REPOSITORY / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name in tables.PAGES:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert tables.render(text) == text, f"run benchmarks/tables.py for {name}"


def test_every_setting_is_documented() -> None:
    text = (REPOSITORY / "docs" / "reference" / "settings.md").read_text("utf-8")
    for name in TrainConfig.__dataclass_fields__:
        assert f"`{name}`" in text
