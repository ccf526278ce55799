"""A large scan with many classes stays within what is stated: a real process's peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "large_ct.py"


@pytest.mark.skipif(sys.platform == "win32", reason="tells no peak of memory")
def test_the_peak_is_bounded_and_far_below_whole_sums(tmp_path: Path) -> None:
    options = (
        "--size 96 96 128 --classes 150 --patch 32 --spacing 0.7 --sums-mib 32 "
        "--overlap 0.1"
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, *options.split(), "--out", tmp_path / "a.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    grown = found["peak_mib"] - found["before_mib"]
    assert grown <= sum(found["bound_mib"].values())
    assert grown < 0.6 * found["whole_sums_mib"]
    assert found["labels_found"] > 1
