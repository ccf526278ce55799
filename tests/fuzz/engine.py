"""Feeds damaged inputs to a reader, and holds it to four promises.

A reader accepts an input or refuses it with an error of ours, whose text is fit to be
shown; within `LONGEST_S`; and without taking more than `MOST_MEMORY`.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from target import LARGEST, Target

from segmamba.errors import SegMambaError

LONGEST_S = 5.0
"""Seconds for one input."""
MOST_MEMORY = 512 << 20
"""Bytes of address space that an input of at most `LARGEST` bytes may take."""
LONGEST_TEXT = 9000
"""Characters of an error."""


class TookTooLongError(BaseException):
    """A reader ran longer than `LONGEST_S`; nothing but us may catch it."""


@dataclass
class Outcome:
    """What became of a number of inputs."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By class of error."""
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    """Broken promises, with the place in the code."""
    broken: list[bytes] = field(default_factory=list)
    """The inputs that broke them."""


def fuzz(
    target: Target, folder: Path, *, inputs: int, seed: int = 0, seconds: float = 1e9
) -> Outcome:
    """Feed a reader damaged inputs; the valid ones first, which it must accept.

    Args:
        target: The reader.
        folder: An empty folder of its own.
        inputs: How many.
        seed: The same seed gives the same inputs.
        seconds: Stop after this time.

    Returns:
        What became of them.
    """
    path = lay_out(target, folder)
    source, outcome = random.Random(f"{target.name} {seed}"), Outcome()
    others = tuple(item.data for item in target.seeds)
    for item in target.seeds:
        path.write_bytes(item.valid())
        target.read(path)
    end = time.monotonic() + seconds
    with limits(MOST_MEMORY):
        while outcome.inputs < inputs and time.monotonic() < end:
            data = source.choice(target.seeds).damaged(source, others)
            feed(target, path, data, outcome)
    return outcome


def lay_out(target: Target, folder: Path) -> Path:
    """Write what lies beside the input; give the input's path."""
    for name, data in target.beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    path = folder / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def feed(target: Target, path: Path, data: bytes, outcome: Outcome) -> None:
    """Read one input, and note what became of it."""
    path.write_bytes(data)
    begin, failure = time.monotonic(), None
    try:
        with deadline(LONGEST_S), warnings.catch_warnings():
            warnings.simplefilter("error")
            target.read(path)
        outcome.accepted += 1
    except SegMambaError as error:
        outcome.refused[type(error).__name__] += 1
        failure = unfit(str(error), path if target.names_file else None)
    except (Exception, TookTooLongError) as error:
        place = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in place[::-1])
        failure = f"{type(error).__name__}: {str(error)[:200]} at {where}"
    outcome.inputs += 1
    outcome.slowest_s = max(outcome.slowest_s, time.monotonic() - begin)
    if failure is not None:
        outcome.failures.append(failure)
        outcome.broken.append(data)


def unfit(text: str, path: Path | None) -> str | None:
    """Say why a text is not fit to be shown; None if it is."""
    if path is not None and str(path) not in text and str(path.parent) not in text:
        return f"names no file: {text[:300]}"
    if "Traceback" in text or len(text) > LONGEST_TEXT:
        return f"no short text: {len(text)} characters, {text[:300]}"
    signs = {sign for sign in text if not (sign.isprintable() or sign in "\n\t")}
    return f"signs {signs} in {text[:300]!r}" if signs else None


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError after some time, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise TookTooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limits(most: int) -> Iterator[None]:
    """Let this process take no more than `most` bytes beyond what it has, on Linux."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


assert LARGEST * 1032 <= MOST_MEMORY, "a legal gzip must fit"
