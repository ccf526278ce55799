"""A prediction or a plan that was killed is gone on with, to the same bytes.

`benchmarks/kills.py` kills twenty times; trainings are killed in training/test_resume.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kills import Killer, digests, killer, moments

from segmamba import workflow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@pytest.fixture(scope="module")
def kill(project: Path) -> Iterator[Killer]:
    with killer(project) as started:
        yield started


def test_a_prediction_that_was_killed_is_gone_on_with(
    project: Path, tmp_path: Path, kill: Killer
) -> None:
    words = ["predict", "run", "data", "--no-mirror", "-o"]
    for name in ("first", "second"):  # which is as fast as those that follow
        begin = time.monotonic()
        kill.run([*words, str(tmp_path / name)])
    longest = 0.6 * (time.monotonic() - begin)
    words.append(str(tmp_path / "out"))
    killed = [kill.run(words, seconds) for seconds in moments(3, longest)]
    assert any(killed)
    kill.run(words)
    assert digests(tmp_path / "out") == digests(project / "predictions")
    cases = json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"]
    assert sorted(cases) == [f"case_{index}" for index in range(6)]


def test_a_plan_that_was_killed_is_made_again(tmp_path: Path, kill: Killer) -> None:
    options = ["--config", "settings.yaml", "--device", "cpu"]
    words = ["plan", "data", *options, "-o"]
    kill.run([*words, str(tmp_path / "whole")])
    for seconds in moments(5, 0.3):
        kill.run([*words, str(tmp_path / "cut")], seconds)
    kill.run([*words, str(tmp_path / "cut")])
    for path in (tmp_path / "cut").glob(".writing-*"):
        path.unlink()  # others may plan in this folder: it stays for ten minutes
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_what_a_killed_plan_left_is_removed_when_it_is_old(
    project: Path, tmp_path: Path
) -> None:
    old, young = (tmp_path / "run" / f".writing-{name}.json" for name in "ab")
    for path in (old, young):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{")
    os.utime(old, times=(0, 0))
    workflow.plan(project / "data", tmp_path / "run", device="cpu")
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("name", ["dataset.json", "fingerprint.json", "plan.json"])
def test_what_a_power_cut_left_of_a_plan_is_made_again(
    project: Path, tmp_path: Path, name: str
) -> None:
    settings = project / "settings.yaml"
    for folder in ("whole", "cut"):
        workflow.plan(project / "data", tmp_path / folder, config=settings)
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    workflow.plan(project / "data", tmp_path / "cut", config=settings)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
