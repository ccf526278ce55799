"""The house rules that tools can hold: style, types, walls between rooms."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e '.[dev]'")
    return subprocess.run(
        [program, *command[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("lint-imports",),
        ("basedpyright", "--level", "error", "--pythonpath", sys.executable),
    ],
    ids=["lint", "format", "walls", "types"],
)
def test_tool_has_nothing_to_say(command: tuple[str, ...]) -> None:
    if command[0] == "basedpyright" and sys.version_info < (3, 11):
        pytest.skip("numpy for Python 3.10 does not type shapes as later ones do")
    result = run(*command)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
