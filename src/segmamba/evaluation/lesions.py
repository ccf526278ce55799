"""Lesion by lesion instead of all at once: Dice and HD95 as the BraTS challenge does.

The reference's lesions are its connected components; those whose surroundings touch
count as one. A predicted component belongs to every lesion whose surroundings it
reaches. Lesions that are missed and components that belong to none are penalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy

from segmamba.errors import ConfigError, describe
from segmamba.evaluation import metrics
from segmamba.types import Array, JsonDict, Spacing3


@dataclass(frozen=True)
class LesionRule:
    """What counts as a lesion, and what a wrong one costs."""

    dilation_voxels: int = 3
    """Steps of growth to an 18-neighbour that give a lesion's surroundings."""
    smallest_mm3: float = 50.0
    """Reference lesions of this volume or less count for nothing."""
    penalty_mm: float = 374.0
    """HD95 of a missed lesion and of a false one; their Dice is 0."""

    def __post_init__(self) -> None:
        values = (self.dilation_voxels, self.smallest_mm3, self.penalty_mm)
        if not all(0 <= value < float("inf") for value in values):
            raise ConfigError(
                describe("bad lesion rule", expected="numbers of 0 or more", found=self)
            )

    def describe(self) -> str:
        """Say the rule in a sentence."""
        return (
            f"reference lesions within {self.dilation_voxels} voxels of growth joined, "
            f"those of {self.smallest_mm3:g} mm3 or less ignored; a missed or false "
            f"lesion has Dice 0, HD95 {self.penalty_mm:g} mm; HD95 the larger directed"
        )


LESION_RULES = {
    "GLI": LesionRule(),
    "SSA": LesionRule(),
    "PED": LesionRule(),
    "MEN": LesionRule(dilation_voxels=1),
    "MET": LesionRule(dilation_voxels=1, smallest_mm3=2.0),
}
"""Rules of the BraTS 2023 tasks: glioma, Sub-Saharan Africa, paediatric, meningioma,
metastases."""


def lesion_rule(rule: LesionRule | str | None) -> LesionRule | None:
    """Look a rule up by the challenge's task.

    Args:
        rule: A task from `LESION_RULES`; a rule or None is returned as it is.

    Returns:
        The rule.

    Raises:
        ConfigError: There is no such task.
    """
    if not isinstance(rule, str):
        return rule
    if rule.upper() not in LESION_RULES:
        raise ConfigError(
            describe("unknown BraTS task", expected=", ".join(LESION_RULES), found=rule)
        )
    return LESION_RULES[rule.upper()]


def lesion_scores(
    prediction: Array,
    reference: Array,
    spacing_mm: Spacing3,
    rule: LesionRule | None = None,
) -> JsonDict:
    """Score a mask lesion by lesion.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
        spacing_mm: Edges of a voxel in mm.
        rule: None for the glioma task's.

    Returns:
        {"lesion_dice", "lesion_hd95_mm": means over lesions found, missed and false
        (1 and 0 mm if there are none), "lesions_found", "lesions_missed",
        "lesions_false", "lesions_ignored": counts; ignored are the small ones}.

    Raises:
        GeometryError: The shapes differ.

    Source:
        The rules of BraTS 2023, synapse.org syn51156910, "Performance metrics". Its
        HD95 weighs borders by their area, ours counts their voxels.
    """
    rule = rule or LesionRule()
    prediction, reference = metrics.as_masks(prediction, reference)
    prediction, reference = _around_content(prediction, reference, rule)
    scene = _Scene.find(prediction, reference, rule)
    volumes = np.bincount(scene.lesions.ravel(), minlength=scene.count + 1)
    large = volumes * np.prod(spacing_mm) > rule.smallest_mm3
    counted = [lesion for lesion in range(1, scene.count + 1) if large[lesion]]
    found = [lesion for lesion in counted if lesion in scene.matched]
    pairs = [_score(scene, lesion, spacing_mm) for lesion in found]
    missed = len(counted) - len(found)
    wrong = missed + scene.false
    total = len(found) + wrong
    return {
        "lesion_dice": sum(dice for dice, _ in pairs) / total if total else 1.0,
        "lesion_hd95_mm": (
            (sum(far for _, far in pairs) + wrong * rule.penalty_mm) / total
            if total
            else 0.0
        ),
        "lesions_found": len(found),
        "lesions_missed": missed,
        "lesions_false": scene.false,
        "lesions_ignored": scene.count - len(counted),
    }


@dataclass(frozen=True)
class _Scene:
    """Lesions and predicted components, and who belongs to whom."""

    lesions: Array
    """(I, J, K): 0 or the reference lesion's number, from 1."""
    components: Array
    """(I, J, K): 0 or the predicted component's number, from 1."""
    count: int
    """Reference lesions."""
    matched: dict[int, Array]
    """Lesion to the components that reach its surroundings, if any do."""
    false: int
    """Components that reach none."""
    lesion_boxes: list[tuple[slice, ...]]
    component_boxes: list[tuple[slice, ...]]

    @classmethod
    def find(cls, prediction: Array, reference: Array, rule: LesionRule) -> _Scene:
        corners = scipy.ndimage.generate_binary_structure(3, 3)
        components, predicted = scipy.ndimage.label(prediction, corners)  # pyright: ignore
        surroundings, count = scipy.ndimage.label(  # pyright: ignore
            _grow(reference, rule.dilation_voxels), corners
        )
        lesions = np.where(reference, surroundings, 0)
        touched = prediction & (surroundings > 0)
        pairs = np.unique(
            np.stack([surroundings[touched], components[touched]]), axis=1
        )
        matched = {
            int(lesion): pairs[1, pairs[0] == lesion] for lesion in np.unique(pairs[0])
        }
        return cls(
            lesions=lesions,
            components=components,
            count=count,
            matched=matched,
            false=predicted - np.unique(pairs[1]).size,
            lesion_boxes=scipy.ndimage.find_objects(lesions),  # pyright: ignore
            component_boxes=scipy.ndimage.find_objects(components),  # pyright: ignore
        )


def _grow(mask: Array, steps: int) -> Array:
    if steps == 0:
        return mask
    edges = scipy.ndimage.generate_binary_structure(3, 2)
    return np.asarray(
        scipy.ndimage.binary_dilation(mask, edges, iterations=steps), bool
    )


def _score(scene: _Scene, lesion: int, spacing_mm: Spacing3) -> tuple[float, float]:
    """Dice and HD95 of a lesion and all components that belong to it."""
    members = scene.matched[lesion]
    boxes = [scene.component_boxes[member - 1] for member in members]
    box = _hull([scene.lesion_boxes[lesion - 1], *boxes])
    is_member = np.zeros(len(scene.component_boxes) + 1, bool)
    is_member[members] = True
    prediction = is_member[scene.components[box]]
    reference = scene.lesions[box] == lesion
    return (
        metrics.dice(prediction, reference),
        metrics.hd95_max(prediction, reference, spacing_mm),
    )


def _hull(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Smallest box around boxes."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes, strict=True)
    )


def _around_content(
    prediction: Array, reference: Array, rule: LesionRule
) -> tuple[Array, Array]:
    """Cut both to their content and its surroundings; nothing else can matter."""
    anything = prediction | reference
    if not anything.any():
        return prediction[:1, :1, :1], reference[:1, :1, :1]
    box = tuple(
        slice(
            max(0, side.start - rule.dilation_voxels), side.stop + rule.dilation_voxels
        )
        for side in metrics.bounding_box(anything)
    )
    return prediction[box], reference[box]
