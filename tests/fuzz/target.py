"""What is fuzzed: a reader, and valid inputs to start from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutate import LARGEST, mutate, mutate_json

Pack = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Seed:
    """A valid input; `pack` is what its parts went through, such as gzip."""

    data: bytes
    pack: Pack | None = None
    is_json: bool = False
    dump: Callable[[Any], str] = json.dumps

    def valid(self) -> bytes:
        return self.data if self.pack is None else self.pack(self.data)

    def damaged(self, source: random.Random, others: tuple[bytes, ...]) -> bytes:
        """Damage what is inside, what is outside, or both."""
        inside = source.random() < 0.75
        data = self.data
        if self.is_json and inside:
            data = mutate_json(data.decode(), source, self.dump).encode()
        elif inside or self.pack is None:
            data = mutate(data, source, others)
        if self.pack is not None:
            data = self.pack(data)
        if not inside:
            data = mutate(data, source)
        return data[:LARGEST]


@dataclass(frozen=True)
class Target:
    """A reader."""

    name: str
    file: str
    """What the input is called."""
    read: Callable[[Path], object]
    """Reads the file."""
    seeds: tuple[Seed, ...]
    beside: dict[str, bytes] = field(default_factory=dict)
    """Other files of the folder."""
    names_file: bool = True
    """Whether each error names the file."""


def plain(files: list[bytes], pack: Pack | None = None) -> tuple[Seed, ...]:
    """Make seeds of whole files."""
    return tuple(Seed(data, pack) for data in files)
