"""3D medical image segmentation with SegMamba.

Names are imported when they are first used, so that `segmamba.ops`, `segmamba.nn` and
`segmamba.training` need torch, numpy and scipy alone, and `segmamba --help` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from segmamba._version import __version__

if TYPE_CHECKING:
    from segmamba import ops, workflow
    from segmamba.checkpoint import load_checkpoint
    from segmamba.config import NetworkConfig, TrainConfig
    from segmamba.data.layouts import load_dataset
    from segmamba.errors import (
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        FormatError,
        GeometryError,
        SegMambaError,
        TrainingError,
    )
    from segmamba.inference.load import load_model
    from segmamba.inference.predictor import Prediction, Predictor
    from segmamba.io import Volume, read_volume
    from segmamba.nn import (
        create_network,
        load_published_weights,
        preset_names,
        published_state_dict,
    )
    from segmamba.workflow.compare import compare

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "GeometryError",
    "NetworkConfig",
    "Prediction",
    "Predictor",
    "SegMambaError",
    "TrainConfig",
    "TrainingError",
    "Volume",
    "__version__",
    "compare",
    "create_network",
    "load_checkpoint",
    "load_dataset",
    "load_model",
    "load_published_weights",
    "ops",
    "preset_names",
    "published_state_dict",
    "read_volume",
    "workflow",
]

_HOMES = {
    "segmamba.checkpoint": ("load_checkpoint",),
    "segmamba.config": ("NetworkConfig", "TrainConfig"),
    "segmamba.data.layouts": ("load_dataset",),
    "segmamba.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "segmamba.inference.load": ("load_model",),
    "segmamba.inference.predictor": ("Prediction", "Predictor"),
    "segmamba.io": ("Volume", "read_volume"),
    "segmamba.nn": (
        "create_network",
        "load_published_weights",
        "preset_names",
        "published_state_dict",
    ),
    "segmamba.workflow.compare": ("compare",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("ops", "workflow"):
        return importlib.import_module(f"segmamba.{name}")
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'segmamba' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
