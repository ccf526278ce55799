"""Damage to valid inputs: bits, lengths, numbers, lines, and the parts of JSON."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 16
"""Bytes of the longest input."""

_EDGES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-40)
_TOKENS = (
    *("0", "-1", "1", "1e400", "nan", "-inf", "9" * 9, "9" * 20, "9" * 5000, "0x10"),
    *(
        "",
        " ",
        "none",
        "true",
        "\x00",
        "\x1b[31m",
        "é",
        "../../x",
        "\r\n\r\n",
        "(1,0,0)",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 10**30, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "..", "/etc/passwd", "\x1b[2J\x00", "9" * 5000, "1e3"),
    *([], {}, [[]], [None], [1, 2, 3], [0.5, 10**9, -1], {"0": "x"}, {"": None}),
    [1] * 1000,
)
"""Values that a field of JSON may be replaced by."""


def mutate(data: bytes, source: random.Random, others: tuple[bytes, ...] = ()) -> bytes:
    """Damage bytes in one to four places.

    Args:
        data: A valid input.
        source: The same state gives the same damage.
        others: Inputs to take pieces from.

    Returns:
        At most `LARGEST` bytes.
    """
    rules = [_bits, _bytes, _cut, _drop, _repeat, _integer, _float, _token, _line]
    for _ in range(source.choice((1, 1, 1, 2, 3, 4))):
        if others and source.random() < 0.05:
            data = _splice(data, source, source.choice(others))
        else:
            data = source.choice(rules)(data, source)
    return data[:LARGEST]


def _place(data: bytes, source: random.Random) -> int:
    """Choose a place; headers come first in files, and matter most."""
    end = len(data) if source.random() < 0.4 else min(len(data), 512)
    return source.randrange(end) if end else 0


def _bits(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, 4) if data else 0):
        changed[_place(data, source)] ^= 1 << source.randrange(8)
    return bytes(changed)


def _bytes(data: bytes, source: random.Random) -> bytes:
    at, count = _place(data, source), source.randint(1, 8)
    return data[:at] + source.randbytes(count) + data[at + count :]


def _cut(data: bytes, source: random.Random) -> bytes:
    return data[: _place(data, source)]


def _drop(data: bytes, source: random.Random) -> bytes:
    at = _place(data, source)
    return data[:at] + data[at + source.choice((1, 2, 4, 8, 64, 512)) :]


def _repeat(data: bytes, source: random.Random) -> bytes:
    at, count = _place(data, source), source.choice((1, 4, 16, 128))
    piece = data[at : at + count] * source.choice((2, 3, 50))
    return data[:at] + piece + data[at + count :]


def _integer(data: bytes, source: random.Random) -> bytes:
    size = source.choice((1, 2, 4, 8))
    value = source.choice(_EDGES) & (256**size - 1)
    at = _place(data, source)
    return (
        data[:at]
        + value.to_bytes(size, source.choice(("little", "big")))
        + data[at + size :]
    )


def _float(data: bytes, source: random.Random) -> bytes:
    at, kind = _place(data, source), source.choice(("<f", ">f", "<d"))
    piece = struct.pack(kind, source.choice(_FLOATS))
    return data[:at] + piece + data[at + len(piece) :]


def _token(data: bytes, source: random.Random) -> bytes:
    """Replace a number or word of a text header."""
    words = list(re.finditer(rb"[-+.\w]+", data[:4096]))
    if not words:
        return data
    word = source.choice(words)
    return data[: word.start()] + source.choice(_TOKENS).encode() + data[word.end() :]


def _line(data: bytes, source: random.Random) -> bytes:
    """Take away, repeat or move a line of a text header."""
    lines = data.split(b"\n", 40)
    at = source.randrange(len(lines))
    line = lines.pop(at)
    for _ in range(source.choice((0, 1, 2))):
        lines.insert(source.randint(0, len(lines)), line)
    return b"\n".join(lines)


def _splice(data: bytes, source: random.Random, other: bytes) -> bytes:
    at, count = _place(other, source), source.choice((4, 32, 256))
    into = _place(data, source)
    return data[:into] + other[at : at + count] + data[into:]


def mutate_json(
    text: str, source: random.Random, dump: Callable[[Any], str] = json.dumps
) -> str:
    """Replace, remove, rename, repeat or nest parts of a JSON value.

    Args:
        text: JSON.
        source: The same state gives the same damage.
        dump: Turns values into text again, such as YAML's.

    Returns:
        The text of another value.
    """
    value: Any = json.loads(text)
    for _ in range(source.choice((1, 1, 2, 3))):
        value = _edit(value, source)
    changed = dump(value)
    if source.random() < 0.1:
        changed = _twice(changed, source)
    if source.random() < 0.02:
        depth = source.choice((200, 1000, 4000))
        changed = "[" * depth + changed + "]" * depth
    return changed[:LARGEST]


def _edit(value: Any, source: random.Random) -> Any:
    """Walk down a random path and change what lies there."""
    deeper = isinstance(value, (dict, list)) and value and source.random() < 0.8
    if not deeper:
        return _replacement(value, source)
    changed = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, deed = source.choice(list(keys)), source.random()
    if deed < 0.1:
        del changed[key]
    elif deed < 0.2 and isinstance(changed, dict):
        changed[source.choice(("x", "", f"{key}s", "network"))] = changed.pop(key)
    elif deed < 0.2:
        changed.insert(key, changed[key])
    else:
        changed[key] = _edit(value[key], source)
    return changed


def _replacement(value: Any, source: random.Random) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and source.random() < 0.5:
        return value * source.choice((-1, 0, 0.5, 2, 1000, 10**9))
    if source.random() < 0.03:
        for _ in range(source.choice((5, 50))):
            value = [value]
        return value
    return copy.deepcopy(source.choice(VALUES))


def _twice(text: str, source: random.Random) -> str:
    """Write a key of a JSON text twice."""
    fields = re.findall(r'"\w+": [^,{}\[\]]+', text)
    return text.replace("{", "{" + source.choice(fields) + ", ", 1) if fields else text
