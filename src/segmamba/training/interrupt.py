"""Ctrl-C and SIGTERM, heeded between steps instead of in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Somebody wants training to stop, by Ctrl-C or SIGTERM."""


class Interrupt:
    """Remembers that somebody wants training to stop.

    The first signal is only noted, so that a step is never cut in two; a second one
    acts at once, as it would without this.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._at_once = False
        self._earlier: dict[int, Any] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals inside the block; outside the main thread, do nothing.

        Python gives signals to the main thread only.
        """
        self.signal_name = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            self._restore()

    @contextlib.contextmanager
    def acting_at_once(self) -> Iterator[None]:
        """Let a signal raise `Interrupted` anywhere inside: nothing can be torn."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.signal_name is not None:
            raise Interrupted(self.signal_name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        if self._at_once:
            raise Interrupted(self.signal_name)

    def _restore(self) -> None:
        while self._earlier:
            number, handler = self._earlier.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
