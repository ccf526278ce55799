"""From scans to label maps: sliding windows, predictor, trained runs, folders."""

from segmamba.inference.cases import (
    CaseResult,
    InputCase,
    PredictionSummary,
    find_cases,
    predict_cases,
)
from segmamba.inference.load import load_model, trained_folds
from segmamba.inference.postprocessing import (
    Postprocessing,
    PostprocessingStep,
    apply_postprocessing,
)
from segmamba.inference.prediction import Prediction
from segmamba.inference.predictor import Predictor
from segmamba.inference.sliding_window import memory_bound_mib, sliding_window_logits

__all__ = [
    "CaseResult",
    "InputCase",
    "Postprocessing",
    "PostprocessingStep",
    "Prediction",
    "PredictionSummary",
    "Predictor",
    "apply_postprocessing",
    "find_cases",
    "load_model",
    "memory_bound_mib",
    "predict_cases",
    "sliding_window_logits",
    "trained_folds",
]
