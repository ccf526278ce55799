"""What the command line shows: progress, tables, errors. Part of the cli room."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from segmamba._version import __version__
from segmamba.errors import SegMambaError, describe

QUIET_INTERVAL_S = 15.0
"""Seconds between progress lines where the output isn't a terminal."""

PLAIN_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)
error_console = Console(stderr=True, soft_wrap=True, highlight=False)


class ProgressDisplay:
    """A progress callback: bars on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                # Of a narrow terminal it gets what is left, and is cut, not the counts.
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._begins: dict[str, tuple[float, int]] = {}
        self._live = console.is_terminal

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        """Show that `done` of `total` steps of the job named `what` are over."""
        if self._live:
            self._show_bar(done, total, what, note)
        else:
            self._show_line(done, total, what, note)

    def _show_bar(self, done: int, total: int, what: str, note: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)

    def _show_line(self, done: int, total: int, what: str, note: str) -> None:
        now = time.monotonic()
        began, first = self._begins.setdefault(what, (now, done))
        if done >= total or now - self._last_line > QUIET_INTERVAL_S:
            self._last_line = now
            parts = [f"{what}: {done}/{total}"]
            if first < done < total:
                left = (now - began) * (total - done) / (done - first)
                parts.append(f"{timedelta(seconds=round(left))} left")
            parts += [note] if note else []
            console.print(", ".join(parts), markup=False)
        if done >= total:  # a next one of this name, as of another fold, begins anew
            del self._begins[what]
            sys.stdout.flush()


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print rows of text under a header; long cells are wrapped, never cut."""
    # Texts, not strings: a name may have brackets, which rich would read as styles.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*[Text(str(cell)) for cell in row])
    console.print(table)


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, soft_wrap=True)


def say_error(text: str) -> None:
    """Print an error to the error stream as it is."""
    error_console.print(f"error: {text}", markup=False, style="bold red")


class _Warnings(logging.Handler):
    """Shows what the library logs, a line each; traces go to a file."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            trace = "".join(traceback.format_exception(*record.exc_info))
            text += f"; please report it with the log {_keep_log(trace)}"
        error_console.print(f"warning: {text}", markup=False, style="yellow")


@contextlib.contextmanager
def showing_warnings() -> Iterator[None]:
    """Show on the error stream what the library warns of inside."""
    logger, handler = logging.getLogger("segmamba"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def accept_every_letter() -> None:
    """Let outputs that are not UTF-8 show a letter they lack as an escape.

    Else a name with such a letter would end a training, on Windows in a redirection.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def quiet_when_unread() -> Iterator[None]:
    """End the program without a word where nobody reads its output any more."""
    output = sys.stdout  # None where there is none
    try:
        try:
            yield
        finally:
            if output is not None:
                output.flush()
    except BrokenPipeError:
        if output is not None:  # what is left in it would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        raise SystemExit(1) from None


def explain(error: Exception) -> str:
    """Put any error into words; for an unforeseen one, keep a log.

    Args:
        error: What ended the command.

    Returns:
        One text, without a trace.
    """
    if isinstance(error, SegMambaError):
        return str(error)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    from segmamba.devices import describe_out_of_memory, is_out_of_memory  # slow

    if is_out_of_memory(error):
        return describe(
            "memory ran out",
            found=describe_out_of_memory(error),
            remedy="Close other programs, or use a smaller patch, batch or scan.",
        )
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return (
        f"unforeseen: {trace.strip().splitlines()[-1]}. Please report it with the log "
        f"{_keep_log(trace)}"
    )


def _explain_os_error(error: OSError) -> str:
    remedy = {
        errno.ENOSPC: "Free some space or choose another folder; nothing was lost.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EROFS: "Choose a folder that you may write to.",
    }.get(error.errno or 0)
    return describe(
        "the system refused a file operation",
        found=error.strerror or str(error),
        file=error.filename,
        remedy=remedy,
    )


def _keep_log(trace: str) -> str:
    """Write a trace to a file and give its name, or say that this failed too."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="segmamba-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"segmamba {__version__}\n{sys.argv}\n{trace}")
    except OSError as error:
        return f"(not written: {error})"
    return log.name


def format_duration(seconds: float) -> str:
    """Write seconds as 45s, 12m30s or 3h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
