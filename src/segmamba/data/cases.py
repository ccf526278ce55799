"""Cached cases as training needs them: open, and small ones in memory."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from segmamba.data.labels import LabelScheme
from segmamba.types import Array, Size3

OPEN_CASES = 64
"""Cases kept open; each holds two file handles."""
HELD_CASE_BYTES = 2**23
"""Cases up to this size are read whole and kept: opening one takes longer than reading
a patch of it, and patches of small cases are used up fast."""
HELD_BYTES = 2**30
"""What all cases kept may take."""


class CaseArrays(Protocol):
    """What training needs of a cached case."""

    @property
    def image(self) -> Array:
        """(C, D, H, W), memory-mapped."""
        ...

    @property
    def label(self) -> Array:
        """(D, H, W) integers, memory-mapped."""
        ...

    @property
    def foreground(self) -> Mapping[int, Array]:
        """Label value to some of its voxels (n, 3)."""
        ...


class CaseSource(Protocol):
    """Anything that loads cases by id, such as `segmamba.data.cache.Cache`."""

    def load(self, case_id: str) -> CaseArrays:
        """Open a case."""
        ...


@dataclass(frozen=True)
class OpenCase:
    """A case from which patches are read."""

    id: str
    """Its name."""
    image: Array
    """(C, D, H, W)."""
    label: Array
    """(D, H, W) integers."""
    shape: Size3
    """Voxels along D, H, W."""
    places: list[Array]
    """For each foreground class that it holds, some voxels (n, 3)."""


class OpenCases:
    """Opens cases, keeps some open and small ones in memory; for several threads."""

    def __init__(self, source: CaseSource, scheme: LabelScheme) -> None:
        self._source = source
        self._skipped = (0, scheme.ignore_label)
        self._opened = functools.lru_cache(maxsize=OPEN_CASES)(self._open)
        self._held: dict[str, OpenCase] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()

    def __call__(self, case_id: str) -> OpenCase:
        """Give a case by its id."""
        return self._held.get(case_id) or self._opened(case_id)

    def _open(self, case_id: str) -> OpenCase:
        case = self._source.load(case_id)
        depth, height, width = case.label.shape
        places = [
            voxels
            for value, voxels in sorted(case.foreground.items())
            if value not in self._skipped and len(voxels)
        ]
        opened = OpenCase(
            case_id, case.image, case.label, (depth, height, width), places
        )
        if isinstance(case.image, np.memmap) and isinstance(case.label, np.memmap):
            return self._unmapped(opened, case.image.nbytes + case.label.nbytes)
        return opened

    def _unmapped(self, case: OpenCase, size: int) -> OpenCase:
        """Give the case with plain arrays: copies where they may be kept, else views.

        Indexing a plain array takes a tenth of the time that a memory map takes.
        """
        with self._lock:
            keep = size <= min(HELD_CASE_BYTES, HELD_BYTES - self._held_bytes)
            self._held_bytes += size * keep
        make = np.array if keep else np.asarray
        case = replace(case, image=make(case.image), label=make(case.label))
        if not keep:
            return case
        with self._lock:
            held = self._held.setdefault(case.id, case)
            if held is not case:  # another thread was first
                self._held_bytes -= size
        return held
