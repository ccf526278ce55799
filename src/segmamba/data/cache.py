"""Preprocessed cases on disk, read in parts through memory maps.

For each case four files: `ID.image.npy` (float16), `ID.label.npy` (int16),
`ID.foreground.npz`, and `ID.json`, written last: a case counts as done only with it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from segmamba.atomic import (
    LEFTOVER_AGE_S,
    atomic_path,
    read_json,
    remove_leftovers,
    write_json,
)
from segmamba.config import to_dict
from segmamba.data.dataset import Case, Dataset
from segmamba.data.fingerprint import read_label
from segmamba.data.geometry import Geometry
from segmamba.data.labels import LabelScheme
from segmamba.data.parallel import Progress, for_each_case
from segmamba.data.plan import Plan, plan_hash
from segmamba.data.preprocess import preprocess_image, preprocess_label
from segmamba.errors import ConfigError, FormatError, SegMambaError, describe
from segmamba.io import read_case, scan_files
from segmamba.types import Array, JsonDict

INDEX_NAME = ".cache.json"
"""Begins with a dot, as the files of no case do: one may be called "cache"."""
CACHE_VERSION = 1
MAX_LOCATIONS = 10_000


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case; its arrays are read from disk where they are touched."""

    id: str
    """The case's name."""
    image: np.memmap[Any, Any]
    """float16 (C, D, H, W), read-only; float32 where a channel isn't normalised."""
    label: np.memmap[Any, Any]
    """int16 (D, H, W), read-only: the data set's own integers."""
    foreground: dict[int, Array]
    """Voxel locations int32 (n, 3), n at most 10 000, for each label (under its
    integer) or region (under its integer of `LabelScheme.regions_order`)."""
    geometry: Geometry
    """The way back to the file's grid."""


@dataclass(frozen=True)
class Cache:
    """A folder of preprocessed cases."""

    folder: Path
    """Where it lies."""
    case_ids: tuple[str, ...]
    """The cases in it, sorted."""

    def load(self, case_id: str) -> CachedCase:
        """Open a case; voxels are read only where they are touched.

        Args:
            case_id: One of `case_ids`.

        Returns:
            The case.

        Raises:
            ConfigError: No such case.
            FormatError: Its files are damaged or gone.
        """
        if case_id not in self.case_ids:
            raise ConfigError(
                describe(
                    f"no case '{case_id}' in the cache",
                    expected="one of " + ", ".join(self.case_ids[:5]) + ", ...",
                    file=self.folder,
                )
            )
        files = _CaseFiles(self.folder, case_id)
        marker = read_json(files.marker)
        try:
            case = CachedCase(
                case_id,
                np.load(files.image, mmap_mode="r", allow_pickle=False),
                np.load(files.label, mmap_mode="r", allow_pickle=False),
                _load_foreground(files.foreground),
                Geometry.from_dict(marker["geometry"], source=files.marker),
            )
            _check_arrays(case)
            return case
        except Exception as error:  # numpy raises nearly every type there is
            raise FormatError(
                describe(
                    f"cached case '{case_id}' is damaged",
                    found=str(error),
                    file=files.image,
                    remedy=f"Delete {files.marker.name} and build the cache again.",
                )
            ) from error


def build_cache(
    dataset: Dataset,
    plan: Plan,
    folder: Path | str,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Preprocess all labelled cases of a data set into a folder.

    What is there already and still fits plan, labels and source files (size and
    time of change) is kept, so an interrupted run goes on where it stopped.

    Args:
        dataset: The data set.
        plan: The plan.
        folder: Where to put the files; made if it is missing.
        workers: Threads; None takes the number of cores, 8 at most.
        progress: Called with (done, total, case id).

    Returns:
        The cache.

    Raises:
        SegMambaError: A case can't be read, doesn't fit or can't be written; the
            text names the case and the file.
    """
    folder = Path(folder)
    _start(folder, plan)
    for_each_case(
        partial(_ensure_case, plan=plan, scheme=dataset.labels, folder=folder),
        dataset.cases,
        workers=workers,
        progress=progress,
    )
    case_ids = tuple(sorted(case.id for case in dataset.cases))
    index = {"version": CACHE_VERSION, "plan_hash": plan_hash(plan), "cases": case_ids}
    write_json(folder / INDEX_NAME, index)
    return Cache(folder, case_ids)


def open_cache(folder: Path | str, plan: Plan) -> Cache:
    """Open a finished cache.

    Args:
        folder: The folder that `build_cache` wrote.
        plan: The plan; it must be the one the cache was built with, as far as
            preprocessing goes.

    Returns:
        The cache.

    Raises:
        ConfigError: There is no finished cache, or it was built with another plan.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    remedy = "Build the cache again; `segmamba train` does so."
    if not path.is_file():
        raise ConfigError(describe("no finished cache", file=folder, remedy=remedy))
    index = read_json(path)
    found = index.get("plan_hash") if isinstance(index, dict) else None
    if found != plan_hash(plan):
        raise ConfigError(
            describe(
                "the cache was built with another plan",
                expected=f"plan hash {plan_hash(plan)}",
                found=found,
                file=path,
                remedy=remedy,
            )
        )
    return Cache(folder, tuple(index["cases"]))


def foreground_locations(
    label: Array, scheme: LabelScheme, seed: str
) -> dict[int, Array]:
    """Sample voxels of each label or region, for patches that are sure to hold it.

    Args:
        label: Integers (D, H, W).
        scheme: What they mean.
        seed: Any text, such as the case's id; the same text gives the same sample.

    Returns:
        For each label (its integer) or region (its integer of `regions_order`)
        int32 (n, 3), n from 0 to 10 000, ascending in row-major order.
    """
    keys = scheme.regions_order or [group[0] for group in scheme.evaluated.values()]
    generator = np.random.default_rng(zlib.crc32(seed.encode()))
    locations = {}
    for key, group in zip(keys, scheme.evaluated.values(), strict=True):
        flat = np.flatnonzero(np.isin(label, group))
        if len(flat) > MAX_LOCATIONS:
            flat = np.sort(generator.choice(flat, MAX_LOCATIONS, replace=False))
        places = np.stack(np.unravel_index(flat, label.shape), axis=1)
        locations[int(key)] = places.astype(np.int32)
    return locations


class _CaseFiles:
    def __init__(self, folder: Path, case_id: str) -> None:
        self.image = folder / f"{case_id}.image.npy"
        self.label = folder / f"{case_id}.label.npy"
        self.foreground = folder / f"{case_id}.foreground.npz"
        self.marker = folder / f"{case_id}.json"


def _start(folder: Path, plan: Plan) -> None:
    """Make the folder; take an index away that no longer tells the truth."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            open_cache(folder, plan)
        except SegMambaError:
            (folder / INDEX_NAME).unlink(missing_ok=True)
        remove_leftovers(folder, LEFTOVER_AGE_S)
    except OSError as error:
        raise SegMambaError(
            describe("can't write the cache", found=str(error), file=folder)
        ) from error


def _ensure_case(case: Case, *, plan: Plan, scheme: LabelScheme, folder: Path) -> None:
    files = _CaseFiles(folder, case.id)
    key = _case_key(case, plan, scheme)
    if _is_done(files, key):
        return
    files.marker.unlink(missing_ok=True)
    volume = read_case(case.images, frame=case.frame)
    image, geometry = preprocess_image(volume, plan)
    label = preprocess_label(
        read_label(case, volume), geometry, scheme, file=case.label
    )
    del volume
    with atomic_path(files.image) as path:
        np.save(path, image.astype(_image_dtype(image, plan), copy=False))
    with atomic_path(files.label) as path:
        np.save(path, label)
    locations = foreground_locations(label, scheme, case.id)
    with atomic_path(files.foreground) as path:
        np.savez(path, **cast(Any, {str(k): v for k, v in locations.items()}))
    write_json(files.marker, {"key": key, "geometry": geometry.to_dict()})


def _image_dtype(image: Array, plan: Plan) -> type[np.floating[Any]]:
    """Half precision holds z-scores to 0.001; raw intensities keep single precision."""
    raw = any(rule.scheme == "none" for rule in plan.normalization)
    largest = max(float(image.max()), -float(image.min()))
    return np.float32 if raw or largest > np.finfo(np.float16).max else np.float16


def _is_done(files: _CaseFiles, key: str) -> bool:
    parts = (files.image, files.label, files.foreground, files.marker)
    if not all(part.is_file() for part in parts):
        return False
    try:
        marker = read_json(files.marker)
    except FormatError:
        return False
    return isinstance(marker, dict) and marker.get("key") == key


def _case_key(case: Case, plan: Plan, scheme: LabelScheme) -> str:
    """Fingerprint of all that a cached case depends on."""
    sources: list[Any] = []
    for scan in (*case.images, *([case.label] if case.label else [])):
        for path in scan_files(scan):
            state = path.stat()
            sources.append((path.name, state.st_size, state.st_mtime_ns))
    parts: JsonDict = {
        "version": CACHE_VERSION,
        "plan": plan_hash(plan),
        "labels": to_dict(scheme),
        "sources": sources,
        **({} if case.frame is None else {"frame": case.frame}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load_foreground(path: Path) -> dict[int, Array]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {int(name): archive[name] for name in archive.files}


def _check_arrays(case: CachedCase) -> None:
    """Refuse arrays that aren't what `_ensure_case` writes, before anyone indexes."""
    shape = case.geometry.shape
    for name, array, dtypes, found in (
        ("image", case.image, ("float16", "float32"), case.image.shape[1:]),
        ("label map", case.label, ("int16",), case.label.shape),
    ):
        if found != shape or array.dtype not in dtypes:
            raise ValueError(f"{name}: {array.dtype} {found} instead of {shape}")
    for places in case.foreground.values():
        if places.dtype != np.int32 or places.shape[1:] != (3,):
            raise ValueError(f"locations: {places.dtype} {places.shape}")
        if len(places) and (places.min() < 0 or (places.max(axis=0) >= shape).any()):
            raise ValueError("locations outside of the image")
