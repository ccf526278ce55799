"""What the operators' tests share: back ends, poisoned memory, gradients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from segmamba.ops import backends


def _module(name: str, file: str):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_loops = _module("ops_loops", "loops.py")
_emulator = _module("ops_emulator", "emulator/emulator.py")


@pytest.fixture
def loops():
    """The formulas as loops."""
    return _loops


@pytest.fixture
def emulator():
    """Runs CUDA kernels on CPU tensors; the test is skipped where it can't."""
    if _emulator.why_not():
        pytest.skip(_emulator.why_not())
    return _emulator


@pytest.fixture
def cuda_device(request):
    """Where the back end "cuda" runs: a GPU, or else the CPU, emulated."""
    if backends.cuda_status() == "available":
        yield torch.device("cuda", torch.cuda.current_device())
        return
    with request.getfixturevalue("emulator").emulated_cuda():
        yield torch.device("cpu")


@pytest.fixture
def poison(monkeypatch):
    """Fill all memory that the operators allocate with not-a-number."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = torch.Tensor.new_empty

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    for name, make in real.items():
        monkeypatch.setattr(torch, name, lambda *a, _m=make, **k: fill(_m(*a, **k)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k))
    )


@pytest.fixture
def threads():
    """Set torch's threads, and set them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread_for_small_tensors(request):
    """Two threads for the kernels that share work out, one for PyTorch's small sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "numba" in request.node.name else 1)
    yield
    torch.set_num_threads(before)
