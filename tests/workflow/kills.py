"""Kill commands with signal 9 at random moments; what is left must be gone on with.

A program imports everything once and forks for each command, so that a kill costs no
more than what is killed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LATE = (
    *("segmamba.workflow", "segmamba.inference", "segmamba.training"),
    *("segmamba.ops._numba.tri_scan", "torch._dynamo"),
)
"""What commands import when they need it."""


@dataclass
class Killer:
    """Starts commands and kills them."""

    server: subprocess.Popen[str]

    def run(
        self,
        words: list[str],
        seconds: float | None = None,
        after: tuple[str, int] = ("", 0),
    ) -> bool:
        """Run a command of segmamba; kill it after so many seconds.

        Args:
            words: Of the command line, without the program.
            seconds: None waits for its end, which must be a good one.
            after: Pattern of paths below the program's folder, and how many there must
                be before the seconds are counted.

        Returns:
            Whether it was killed before its end.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps([words, seconds, after]) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        assert answer in ("killed", 0), answer
        return answer == "killed"


@contextmanager
def killer(folder: Path) -> Iterator[Killer]:
    """Start the program that forks, with this as its current folder."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield Killer(server)
        assert server.stdin is not None
        server.stdin.close()


def moments(count: int, most: float, seed: int = 0) -> list[float]:
    """Give random moments, in seconds."""
    source = random.Random(seed)
    return [source.uniform(0, most) for _ in range(count)]


def digests(folder: Path) -> dict[str, str]:
    """Sum up all files of a folder but those that state times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def wait_for(pattern: str, count: int, child: int) -> int | None:
    """Wait for so many paths; give the child's status if it ends before."""
    while count and len(list(Path().glob(pattern))) < count:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    return None


def serve() -> None:
    """Read commands, a line each; fork, wait or kill, and answer."""
    for name in LATE:
        importlib.import_module(name)
    from segmamba import cli

    for line in sys.stdin:
        words, seconds, after = json.loads(line)
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os._exit(cli.main(words))
        status = None
        if seconds is not None:
            status = wait_for(*after, child)
            time.sleep(seconds)
        if seconds is not None and status is None:
            os.kill(child, signal.SIGKILL)
        if status is None:
            _, status = os.waitpid(child, 0)
        answer = "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
