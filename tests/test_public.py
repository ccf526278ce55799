"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import segmamba


def test_all_is_sorted_and_complete() -> None:
    assert segmamba.__all__ == sorted(segmamba.__all__)
    assert segmamba.__all__ == [
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


def test_every_name_can_be_had() -> None:
    for name in segmamba.__all__:
        assert getattr(segmamba, name) is not None


def test_network_operators_and_training_need_no_file_formats() -> None:
    code = (
        "import sys\n"
        "for name in ('nibabel', 'isal', 'tyro', 'rich', 'matplotlib', 'numba'):\n"
        "    sys.modules[name] = None\n"
        "import segmamba.nn, segmamba.ops, segmamba.training.trainer\n"
        "import segmamba\n"
        "segmamba.create_network('segmamba-light', in_channels=1, out_channels=2)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
