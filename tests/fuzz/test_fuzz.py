"""Damaged inputs of every kind are accepted or refused, quickly and in words.

A small share of what `python benchmarks/fuzz.py` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import Outcome, feed, fuzz, lay_out
from target import Seed, Target
from targets import NAMES, make_targets

from segmamba.errors import FormatError

INPUTS = 150


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("name", NAMES)
def test_every_promise_is_kept(
    readers: dict[str, Target], tmp_path: Path, name: str
) -> None:
    outcome = fuzz(readers[name], tmp_path, inputs=INPUTS)
    assert outcome.failures == []
    assert outcome.inputs == INPUTS
    assert outcome.accepted + outcome.refused.total() == INPUTS
    assert outcome.refused.total() > INPUTS // 10, "the damage does nothing"


def test_the_same_seed_gives_the_same_inputs(
    readers: dict[str, Target], tmp_path: Path
) -> None:
    outcomes = [
        fuzz(readers["nrrd"], tmp_path / str(index), inputs=40, seed=seed)
        for index, seed in enumerate((1, 1, 2))
    ]
    counts = [(one.accepted, one.refused) for one in outcomes]
    assert counts[0] == counts[1] != counts[2]


def _raise(error: BaseException) -> None:
    raise error


def _loop(path: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda path: _raise(KeyError("x")), "KeyError"),
        (lambda path: _raise(FormatError("a file is bad")), "names no file"),
        (lambda path: _raise(FormatError(f"{path} \x1b[2J")), "signs"),
        (lambda path: _raise(FormatError(f"{path} {'x' * 10_000}")), "no short text"),
        (lambda path: _raise(MemoryError()), "MemoryError"),
        (_loop, "TookTooLongError"),
    ],
)
def test_broken_promises_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read, says: str
) -> None:
    monkeypatch.setattr("engine.LONGEST_S", 0.2)
    target, outcome = Target("x", "x.txt", read, (Seed(b"a"),)), Outcome()
    feed(target, lay_out(target, tmp_path), b"a", outcome)
    assert len(outcome.failures) == 1
    assert says in outcome.failures[0]
