"""Runs `triton_scan.py`, the tests of the scan's Triton kernels, where they can run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmamba.ops.backends import triton_status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]


def run_kernels(interpret: str) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    file = Path(__file__).parent / "triton_scan.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


def test_kernels_in_the_interpreter():
    run_kernels("1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    assert triton_status() == "available"
    run_kernels("0")
