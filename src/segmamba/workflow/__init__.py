"""The job step by step: each command of the command line as a function."""

from segmamba.workflow.compare import compare
from segmamba.workflow.fold import TrainingOutcome
from segmamba.workflow.folder import Progress, RunFolder, RunSettings, staged
from segmamba.workflow.information import describe_plan, info
from segmamba.workflow.steps import check, evaluate, plan, predict
from segmamba.workflow.train import train

__all__ = [
    "Progress",
    "RunFolder",
    "RunSettings",
    "TrainingOutcome",
    "check",
    "compare",
    "describe_plan",
    "evaluate",
    "info",
    "plan",
    "predict",
    "staged",
    "train",
]
