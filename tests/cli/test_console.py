"""What the command line shows: names with any letters, on any output."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest
from docstring_parser import parse_from_object
from rich.console import Console

import segmamba
from segmamba import cli, console
from segmamba.cli.words import parse_duration
from segmamba.errors import ConfigError, TrainingError
from segmamba.training.interrupt import Interrupted

NAMES = ("a [core]", "b[/x]", "[bold]c")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_an_option_is_one_line(name: str) -> None:
    """The command line's library keeps breaks where lines are indented."""
    for option in parse_from_object(cli.COMMANDS[name]).params:
        assert "\n" not in (option.description or ""), option.arg_name


@dataclass(frozen=True)
class Tell:
    """A command that prints a letter."""

    def run(self) -> int:
        """Print."""
        console.say("case \u03b2")
        return 0


def test_a_letter_that_the_output_lacks_ends_no_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setitem(cli.COMMANDS, "info", Tell)
    assert cli.main(["info"]) == 0
    assert b"case \\u03b2" in output.buffer.getvalue()  # type: ignore[attr-defined]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"segmamba {segmamba.__version__}\n"


def test_an_interrupted_training_has_the_exit_code_of_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Stopped:
        def run(self) -> int:
            raise TrainingError("saved") from Interrupted("SIGINT")

    monkeypatch.setitem(cli.COMMANDS, "info", Stopped)
    assert cli.main(["info"]) == 130
    assert "saved" in capsys.readouterr().err


def test_a_narrow_terminal_shows_counts_and_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.StringIO()
    live = Console(file=output, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "console", live)
    with console.ProgressDisplay() as progress:
        progress(890, 1000, "preprocessing", "step 3, loss 1.8044, 1.5 patches/s " * 3)
    shown = output.getvalue()
    assert "890/1000 0:00:00 left" in shown
    assert "step 3, loss" in shown


def test_lines_in_a_file_tell_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, clock = io.StringIO(), iter([0.0, 30.0, 31.0, 120.0, 500.0, 530.0])
    monkeypatch.setattr(console, "console", Console(file=output, width=160))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.ProgressDisplay() as progress:
        for done in (10, 20, 21, 100):
            progress(done, 100, "cases", "b.nii")
        for done in (0, 10):  # the same work of another fold
            progress(done, 100, "cases")
    assert output.getvalue().splitlines() == [
        "cases: 20/100, 0:04:00 left, b.nii",
        "cases: 100/100, b.nii",
        "cases: 0/100",
        "cases: 10/100, 0:04:30 left",
    ]


def test_brackets_in_names_are_no_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    live = Console(file=output, width=160, force_terminal=True, highlight=False)
    monkeypatch.setattr(console, "console", live)
    console.print_table("Scores of [x]", NAMES, [NAMES])
    with console.ProgressDisplay() as progress:
        progress(1, 2, NAMES[0], NAMES[1])
    shown = output.getvalue()
    assert "Scores of [x]" in shown
    assert all(shown.count(name) >= 2 for name in NAMES)


@pytest.mark.parametrize(
    "line",
    [
        "predict run scan -o out --seg-type LABELMAP",
        "predict run scan -o out --segments codes.json",
        "evaluate predictions references -o m.json --lesion-task MET",
        "benchmark layer --figure f.png",
        "benchmark scan --case folder",
    ],
)
def test_an_option_that_nothing_would_heed_is_refused(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{line.split()[-2]} does nothing here: expected" in shown


@pytest.mark.parametrize("text", ["1h30", "10m5", "", "m", "1.5.2", "-3", "2d", "0m"])
def test_a_time_that_can_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="bad time"):
        parse_duration(text)
    assert [parse_duration(t) for t in ("1.5h", "1h30m5s", "2m", "7", " 1s")] == [
        *(5400, 5405, 120, 7, 1)
    ]
