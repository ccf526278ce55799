"""Cases in threads: order, progress and named failures."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from segmamba.data.dataset import Case
from segmamba.data.parallel import for_each_case
from segmamba.errors import FormatError, GeometryError, SegMambaError

CASES = [Case(f"c{index}", (Path("x"),)) for index in range(8)]


def test_results_keep_the_order_whoever_is_first():
    def work(case: Case) -> str:
        time.sleep(0.02 if case.id in ("c0", "c3") else 0)
        return case.id

    seen = []
    results = for_each_case(
        work, CASES, workers=4, progress=lambda *news: seen.append(news)
    )
    assert results == [case.id for case in CASES]
    assert [news[:2] for news in seen] == [(n, 8) for n in range(1, 9)]
    assert {news[2] for news in seen} == set(results)
    assert for_each_case(work, []) == []


def test_progress_is_called_in_the_caller_s_thread():
    threads = set()
    for_each_case(
        str, CASES, workers=2, progress=lambda *_: threads.add(threading.get_ident())
    )
    assert threads == {threading.get_ident()}


def test_the_first_bad_case_in_order_is_named():
    def work(case: Case) -> None:
        if case.id == "c1":
            time.sleep(0.05)
            raise GeometryError("slow and first.")
        if case.id == "c2":
            raise FormatError("fast and second.")

    with pytest.raises(GeometryError, match=r"case c1: slow and first\."):
        for_each_case(work, CASES, workers=3)


def test_a_bad_case_stops_those_not_begun():
    begun = []

    def work(case: Case) -> None:
        begun.append(case.id)
        raise FormatError("bad.")

    with pytest.raises(FormatError, match="case c0"):
        for_each_case(work, CASES, workers=1)
    assert len(begun) < len(CASES)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError("full")])
def test_a_machine_s_limits_become_clear_errors(error):
    def work(case: Case) -> None:
        raise error

    with pytest.raises(SegMambaError, match=r"case c0 failed.*Free disk space"):
        for_each_case(work, CASES[:1])


def test_a_bug_stays_a_bug():
    with pytest.raises(ZeroDivisionError):
        for_each_case(lambda case: 1 // 0, CASES)
