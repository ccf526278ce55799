"""Which cases train and which ones judge: made from sorted ids and a stated seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from segmamba.atomic import MADE_ANEW, read_json, write_json
from segmamba.errors import ConfigError, describe

Split = dict[str, list[str]]
"""Case ids under "train" and "val" (the paper's split also has "test")."""

_MASK = 2**64 - 1


def make_splits(ids: Iterable[str], seed: int = 12345, folds: int = 5) -> list[Split]:
    """Divide cases into folds; each case is in "val" exactly once.

    Args:
        ids: Case ids in any order; they are sorted first.
        seed: Any integer. The result depends on ids, seed and folds only: not on
            the platform and not on the version of a library.
        folds: Number of folds, 2 at least.

    Returns:
        One {"train": [...], "val": [...]} a fold, ids sorted; the sizes of "val"
        differ by one at most.

    Raises:
        ConfigError: There are fewer cases than folds, fewer than two folds, or an
            id is there twice.
    """
    names = _sorted_ids(ids)
    if folds < 2 or len(names) < folds:
        raise ConfigError(
            describe(
                "can't divide the cases into folds",
                expected="2 folds or more, and as many cases as folds",
                found=f"{len(names)} cases and {folds} folds",
                remedy="Train on all cases (--fold all), or give splits of your own "
                "(--splits).",
            )
        )
    shuffled = _shuffled(names, seed)
    parts = [sorted(shuffled[fold::folds]) for fold in range(folds)]
    return [
        {"train": [name for name in names if name not in set(part)], "val": part}
        for part in parts
    ]


def paper_split(ids: Iterable[str], seed: int = 12345) -> Split:
    """Divide cases at random into 70 % training, 10 % validation and 20 % test.

    Args:
        ids: Case ids in any order; they are sorted first.
        seed: Any integer.

    Returns:
        {"train": [...], "val": [...], "test": [...]}, ids sorted. The last two are
        rounded to whole cases, one at least.

    Raises:
        ConfigError: There are fewer than three cases, or an id is there twice.

    Source: the division of arXiv 2401.13560.
    """
    names = _sorted_ids(ids)
    if len(names) < 3:
        raise ConfigError(
            describe("too few cases", expected="3 or more", found=len(names))
        )
    shuffled = _shuffled(names, seed)
    num_val = max(1, round(0.1 * len(names)))
    num_test = max(1, round(0.2 * len(names)))
    return {
        "train": sorted(shuffled[num_val + num_test :]),
        "val": sorted(shuffled[:num_val]),
        "test": sorted(shuffled[num_val : num_val + num_test]),
    }


def save_splits(path: Path | str, splits: Sequence[Split]) -> None:
    """Write splits atomically as JSON: a list of {"train": [...], "val": [...]}."""
    write_json(path, list(splits))


def load_splits(path: Path | str) -> list[Split]:
    """Read splits: our file, nnU-Net's splits_final.json, or one of one's own.

    Args:
        path: JSON: a list of {"train": [ids], "val": [ids]}, or a single one.

    Returns:
        One mapping a fold.

    Raises:
        FormatError: The file is missing or not JSON.
        ConfigError: It holds something else, or a case trains and validates at once.
    """
    data = read_json(path, MADE_ANEW)
    folds = [data] if isinstance(data, dict) else data
    if not isinstance(folds, list) or not folds:
        raise _bad_splits("a list of folds", data, path)
    for fold in folds:
        _check_fold(fold, path)
    return folds


def _check_fold(fold: Any, path: Path | str) -> None:
    if not isinstance(fold, dict) or not {"train", "val"} <= set(fold):
        raise _bad_splits('{"train": [ids], "val": [ids]}', fold, path)
    seen: set[str] = set()
    for name, ids in fold.items():
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise _bad_splits(f'a list of ids under "{name}"', ids, path)
        twice = seen & set(ids) or {one for one in ids if ids.count(one) > 1}
        if twice:
            raise _bad_splits("each id once in a fold", sorted(twice)[:5], path)
        seen |= set(ids)
    if not fold["train"]:
        raise _bad_splits('ids under "train"', "none", path)


def _bad_splits(expected: str, found: object, path: Path | str) -> ConfigError:
    return ConfigError(
        describe("bad splits", expected=expected, found=repr(found)[:80], file=path)
    )


def _sorted_ids(ids: Iterable[str]) -> list[str]:
    names = sorted(ids)
    for one, other in itertools.pairwise(names):
        if one == other:
            raise ConfigError(describe("a case is there twice", found=repr(one)))
    return names


def _shuffled(names: list[str], seed: int) -> list[str]:
    """Order by a SplitMix64 key: plain integers, so the same everywhere for ever."""
    keys = [_splitmix64((seed & _MASK) + index) for index in range(len(names))]
    order = sorted(range(len(names)), key=keys.__getitem__)
    return [names[index] for index in order]


def _splitmix64(value: int) -> int:
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
