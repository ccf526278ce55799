"""A command whose output nobody reads to the end, such as `segmamba info | head`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["info"]])
def test_an_output_that_nobody_reads_ends_the_command_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "segmamba", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_lost_line_of_progress_is_no_unforeseen_error(monkeypatch):
    from segmamba import cli

    class Broken:
        def run(self) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cli._run(Broken(), [])
