"""Which back end runs where, on machines that are played."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from segmamba import workflow
from segmamba.config import TrainConfig
from segmamba.errors import BackendUnavailableError
from segmamba.inference import predictor
from segmamba.ops import backends, instance_norm, norm
from segmamba.ops._cuda import nvrtc
from segmamba.ops.backends import (
    automatic_backend,
    cuda_status,
    resolve_backend,
    warn_if_slow,
)
from segmamba.training import trainer
from segmamba.training.trainer import Trainer

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Machine:
    """Plays a machine with an H100 and its NVRTC, unless told otherwise."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "a played GPU")
        monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
        monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 90))
        self.capability(9, 0)

    def capability(self, *numbers):
        self.patch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: numbers
        )

    def without_nvrtc(self):
        """PyTorch's, built with CUDA 12.8, is missing."""
        self.patch.setattr(torch.version, "cuda", "12.8")
        self.patch.setattr(nvrtc, "_folders", lambda major: [])
        self.patch.setattr(nvrtc, "architectures", nvrtc.library)
        forget()


def forget():
    for function in (
        cuda_status,
        backends._warn_once,
        nvrtc.library,
    ):
        function.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    forget()
    yield Machine(monkeypatch)
    forget()


def take(device=GPU):
    return resolve_backend("auto", device=device, dtype=torch.float32)


def test_a_gpu_takes_cuda(machine):
    assert cuda_status() == "available"
    assert automatic_backend(GPU) == ("cuda", "")
    assert take(CPU) == "numba"
    assert resolve_backend("auto", device=GPU, dtype=torch.float64) == "chunked"


def test_without_nvrtc_the_gpu_works_and_says_what_to_install(machine):
    machine.without_nvrtc()
    reason = cuda_status()
    assert "NVRTC" in reason
    assert "nvidia-cuda-nvrtc-cu12 with pip" in reason
    assert automatic_backend(GPU) == ("chunked", reason)
    with pytest.raises(BackendUnavailableError, match="nvidia-cuda-nvrtc-cu12"):
        resolve_backend("cuda", device=GPU, dtype=torch.float32)


def test_other_gpus_take_chunked(machine, monkeypatch):
    for numbers, text in (((6, 1), "the kernels need 7.0"), ((7, 0), "NVRTC 13.0")):
        machine.capability(*numbers)
        forget()
        assert "{}.{}".format(*numbers) in cuda_status()
        assert text in cuda_status()
        assert take() == "chunked"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    forget()
    assert "AMD" in cuda_status()
    assert take() == "chunked"


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_take_chunked_without_a_reason(machine, kind):
    assert automatic_backend(torch.device(kind)) == ("chunked", "")


def test_the_norm_takes_the_same_path(machine):
    x = torch.randn(1, 2, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    assert norm._takes_cuda(GpuTensor(x), None, "auto")
    machine.without_nvrtc()
    assert "NVRTC" in norm._why_not_cuda(GpuTensor(x), None)
    assert not norm._takes_cuda(GpuTensor(x), None, "auto")
    assert instance_norm(x).shape == x.shape


class GpuTensor:
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = GPU

    def __init__(self, x):
        self.x = x

    def __getattr__(self, name):
        return getattr(self.x, name)


def info():
    return dict(workflow.info()["Back ends of the scan"])


def test_info_states_the_path(machine):
    assert info()["auto takes on the CPU"] == "numba"
    assert info()["auto takes on the GPU"] == "cuda"
    machine.without_nvrtc()
    row = info()["auto takes on the GPU"]
    assert row.startswith("chunked, slower than it could be")
    assert "nvidia-cuda-nvrtc-cu12" in row


def test_info_knows_no_gpu_where_there_is_none(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "auto takes on the GPU" not in info()


def test_the_slow_path_is_told_once(machine, caplog):
    machine.without_nvrtc()
    with caplog.at_level(logging.WARNING, "segmamba"):
        for device in (CPU, GPU, GPU):
            warn_if_slow(device)
    assert len(caplog.messages) == 1
    assert "'chunked'" in caplog.text
    assert "nvidia-cuda-nvrtc-cu12" in caplog.text


def test_the_fast_path_is_told_of_nothing(machine, caplog):
    warn_if_slow(GPU)
    assert not caplog.messages


def begin_training():
    Trainer(torch.nn.Identity(), None, None, TrainConfig(), "run", device="cuda")


def begin_prediction():
    predictor.Predictor([], SimpleNamespace(), ["t1"], None, device="cuda")


@pytest.mark.parametrize(
    ("module", "begin"), [(trainer, begin_training), (predictor, begin_prediction)]
)
def test_training_and_prediction_warn(machine, monkeypatch, caplog, module, begin):
    """They begin with it, before anything goes to the GPU."""

    def stop(*_):
        raise StopIteration

    machine.without_nvrtc()
    monkeypatch.setattr(predictor, "_check", lambda *_: None)
    monkeypatch.setattr(module, "precision_for", stop)
    with pytest.raises(StopIteration):
        begin()
    assert "nvidia-cuda-nvrtc-cu12" in caplog.text
