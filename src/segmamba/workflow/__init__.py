"""The job step by step: each command of the command line as a function."""

from segmamba.workflow.compare import compare
from segmamba.workflow.cross_validation import CrossValidation, cross_validate
from segmamba.workflow.evaluate import evaluate
from segmamba.workflow.fold import TrainingOutcome
from segmamba.workflow.folder import Progress, RunFolder, RunSettings, staged
from segmamba.workflow.information import commands_again, describe_plan, info
from segmamba.workflow.postprocess import postprocess
from segmamba.workflow.steps import check, plan, predict
from segmamba.workflow.train import train

__all__ = [
    "CrossValidation",
    "Progress",
    "RunFolder",
    "RunSettings",
    "TrainingOutcome",
    "check",
    "commands_again",
    "compare",
    "cross_validate",
    "describe_plan",
    "evaluate",
    "info",
    "plan",
    "postprocess",
    "predict",
    "staged",
    "train",
]
