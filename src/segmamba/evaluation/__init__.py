"""Scores of label maps: Dice, surface distances in mm, volumes, and their summary."""

from segmamba.evaluation.evaluate import evaluate_case, evaluate_folder
from segmamba.evaluation.lesions import LESION_RULES, LesionRule, lesion_scores
from segmamba.evaluation.metrics import (
    dice,
    hd95,
    hd95_max,
    surface_dice,
    surface_distances,
    volume_ml,
)
from segmamba.evaluation.summary import summarize_cases, summarize_values

__all__ = [
    "LESION_RULES",
    "LesionRule",
    "dice",
    "evaluate_case",
    "evaluate_folder",
    "hd95",
    "hd95_max",
    "lesion_scores",
    "summarize_cases",
    "summarize_values",
    "surface_dice",
    "surface_distances",
    "volume_ml",
]
