"""Clean label maps: keep the largest component, drop small ones, fill holes.

Every step works on one label or region, inside the box around it. Regions overlap, so
a voxel that leaves or enters one gets the integer that says so and changes no other
region more than it must: what is taken out of TC stays in WT, and leaves ET too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy

from segmamba import atomic
from segmamba.config import from_dict, to_dict
from segmamba.data.labels import LabelScheme
from segmamba.errors import ConfigError, describe
from segmamba.evaluation.metrics import bounding_box
from segmamba.types import Array, Spacing3

POSTPROCESSING_FILE = "postprocessing.json"
"""Name of the file in a run's folder."""

NEIGHBOURS = np.ones((3, 3, 3), bool)
"""Voxels that share a face, an edge or a corner are of one component."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class PostprocessingStep:
    """One change of one label or region."""

    label: str
    """Name of the label or region."""
    operation: Literal["largest-component", "minimal-size", "fill-holes"]
    """Keep the largest component; drop those that are too small; fill holes."""
    min_volume_mm3: float | None = None
    """Smallest volume of a component that is kept (minimal-size)."""

    def __post_init__(self) -> None:
        volume, wanted = self.min_volume_mm3, self.operation == "minimal-size"
        if wanted != (volume is not None) or (volume is not None and not volume > 0):
            raise ConfigError(
                describe(
                    f"bad min_volume_mm3 for {self.operation} of {self.label}",
                    expected="a number above 0" if wanted else "none",
                    found=volume,
                )
            )


@dataclass(frozen=True)
class Postprocessing:
    """What is done to every label map of a run, and how that was decided."""

    steps: tuple[PostprocessingStep, ...] = ()
    """In the order in which they are done."""
    decision: dict[str, Any] = field(default_factory=dict)
    """The cases, all candidates and their gains; nothing is computed from it."""


def load_postprocessing(path: Path | str, scheme: LabelScheme) -> Postprocessing:
    """Read the post-processing of a run.

    Args:
        path: The JSON file.
        scheme: The run's labels.

    Returns:
        The steps and their decision.

    Raises:
        FormatError: The file is missing or not JSON.
        ConfigError: A key is unknown or missing, a value can't be used, or a step
            names a label that there isn't.
    """
    loaded = from_dict(Postprocessing, atomic.read_json(path), source=str(path))
    for step in loaded.steps:
        if step.label not in scheme.evaluated:
            raise ConfigError(
                describe(
                    "the post-processing names an unknown label",
                    expected="one of " + ", ".join(scheme.evaluated),
                    found=step.label,
                    file=path,
                )
            )
    return loaded


def save_postprocessing(path: Path | str, postprocessing: Postprocessing) -> None:
    """Write a post-processing atomically as JSON that people can read and edit."""
    atomic.write_json(path, to_dict(postprocessing))


def apply_postprocessing(
    label_map: Array,
    spacing_mm: Spacing3,
    steps: Sequence[PostprocessingStep],
    scheme: LabelScheme,
) -> Array:
    """Do all steps, one after another.

    Beside the copy, memory is about 12 bytes a voxel of the box around one label.

    Args:
        label_map: (I, J, K) integers; it is left as it is.
        spacing_mm: Edges of a voxel in mm.
        steps: What to do.
        scheme: What the integers mean.

    Returns:
        (I, J, K) integers of the same type.
    """
    result = label_map.copy()
    for step in steps:
        _apply(result, math.prod(spacing_mm), step, scheme)
    return result


def largest_component(mask: Array) -> Array:
    """Keep the largest component; of equal ones, the first in the array's order.

    Args:
        mask: (I, J, K) mask.

    Returns:
        A mask of the same shape.
    """
    components, sizes = _components(mask)
    if len(sizes) == 1:
        return mask.copy()
    return components == int(np.argmax(sizes))


def without_small_components(mask: Array, min_voxels: float) -> Array:
    """Drop components of fewer voxels than so many, perhaps all of them.

    Args:
        mask: (I, J, K) mask.
        min_voxels: Fewest voxels of a component that is kept, above 0.

    Returns:
        A mask of the same shape.
    """
    components, sizes = _components(mask)
    return (sizes >= min_voxels * (1 - _ROUNDING))[components]


def without_holes(mask: Array) -> Array:
    """Fill what the mask encloses.

    Args:
        mask: (I, J, K) mask.

    Returns:
        The mask with every voxel from which no way through faces of voxels outside
        of it leads to the border of the array.
    """
    return np.asarray(scipy.ndimage.binary_fill_holes(mask))


def _components(mask: Array) -> tuple[Array, Array]:
    """Number the components from 1, and count their voxels; number 0 counts none."""
    components = np.empty(mask.shape, np.int32)
    scipy.ndimage.label(mask, NEIGHBOURS, output=components)
    sizes = np.zeros(int(components.max(initial=0)) + 1, np.int64)
    for slab in components:  # bincount takes 8 bytes a voxel
        sizes += np.bincount(slab.ravel(), minlength=len(sizes))
    sizes[0] = 0
    return components, sizes


def _apply(
    label_map: Array, voxel_mm3: float, step: PostprocessingStep, scheme: LabelScheme
) -> None:
    """Do a step in place."""
    group = scheme.evaluated[step.label]
    mask = np.isin(label_map, group)
    if not mask.any():
        return
    box = bounding_box(mask)  # outside of it there is nothing to drop or to fill
    mask, part = mask[box], label_map[box]
    if step.operation == "fill-holes":
        _replace(part, without_holes(mask) & ~mask, _after_entering(scheme, group))
        return
    if step.operation == "largest-component":
        kept = largest_component(mask)
    else:
        assert step.min_volume_mm3 is not None
        kept = without_small_components(mask, step.min_volume_mm3 / voxel_mm3)
    _replace(part, mask & ~kept, _after_leaving(scheme, group))


def _replace(part: Array, where: Array, integers: dict[int, int]) -> None:
    for old, new in integers.items():
        part[where & (part == old)] = new


def _after_leaving(scheme: LabelScheme, group: tuple[int, ...]) -> dict[int, int]:
    """Map each integer of a region to what its voxels become outside of the region.

    They stay in all other regions but those that lie in this one, as far as there is
    an integer for that; 0 is in none.
    """
    outside = [value for value in _integers(scheme) if value not in group]
    after = {}
    for old in group:
        wanted = {
            name for name in _regions_of(scheme, old) if not _is_in(scheme, name, group)
        }
        fitting = [v for v in outside if _regions_of(scheme, v) <= wanted]
        after[old] = max(fitting, key=lambda v: (len(_regions_of(scheme, v)), -v))
    return after


def _after_entering(scheme: LabelScheme, group: tuple[int, ...]) -> dict[int, int]:
    """Map each integer outside of a region to what its voxels become in it.

    They leave no region and enter as few others as possible. Where they would have to
    leave one, as another class would, the integer is left out: they stay.
    """
    inside = [value for value in _integers(scheme) if value in group]
    after = {}
    for old in (value for value in _integers(scheme) if value not in group):
        had = _regions_of(scheme, old)
        fitting = [v for v in inside if had <= _regions_of(scheme, v)]
        if fitting:
            after[old] = min(fitting, key=lambda v: (len(_regions_of(scheme, v)), v))
    return after


def _integers(scheme: LabelScheme) -> list[int]:
    """Integers of a predicted label map: all but the ignore label."""
    known = {0, *scheme.known_values, *scheme.regions_order}
    return sorted(known - {scheme.ignore_label})


def _regions_of(scheme: LabelScheme, value: int) -> set[str]:
    return {name for name, group in scheme.evaluated.items() if value in group}


def _is_in(scheme: LabelScheme, name: str, group: tuple[int, ...]) -> bool:
    return set(scheme.evaluated[name]) <= set(group)
