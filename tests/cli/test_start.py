"""What a command imports, for that is most of the time until it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "dynamic_network_architectures",
    "highdicom",
    "matplotlib",
    "monai",
    "numba",
    "pandas",
    "pydicom",
    "scipy.ndimage",
    "scipy.signal",
    "scipy.spatial",
    "scipy.stats",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "triton",
)
"""Each takes a tenth of a second to several seconds."""


def loaded(code: str) -> set[str]:
    """Say which of the heavy modules a program imports."""
    code += f"\nimport sys\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def inevitable() -> set[str]:
    """What the libraries import of themselves that every prediction needs."""
    return loaded("import torch, numpy, scipy, nibabel.nifti1, safetensors.torch, yaml")


def test_help_needs_no_network():
    code = "import segmamba, segmamba.cli, sys\nassert 'torch' not in sys.modules"
    assert not loaded(code)


@pytest.mark.parametrize(
    "code",
    [
        "import segmamba.workflow",
        "import segmamba.inference",
        "import segmamba.training",
        "from segmamba import *",
    ],
)
def test_importing_is_light(code: str, inevitable: set[str]):
    assert loaded(code) <= inevitable


def test_predicting_imports_what_it_uses(
    project: Path, tmp_path: Path, inevitable: set[str]
):
    words = ["predict", str(project / "run"), str(project / "scan.nii.gz")]
    words += ["-o", str(tmp_path / "label.nii.gz"), "--device", "cpu"]
    code = f"from segmamba.cli import main\nassert main({words}) == 0"
    # Numba is the CPU's back end, and imports SciPy's BLAS.
    assert loaded(code) <= inevitable | {"numba"}
