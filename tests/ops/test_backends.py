"""Which back end runs where, on machines that are played."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from segmamba import workflow
from segmamba.config import TrainConfig
from segmamba.errors import BackendUnavailableError
from segmamba.inference import predictor
from segmamba.ops import backends, instance_norm, norm
from segmamba.ops.backends import (
    automatic_backend,
    resolve_backend,
    triton_status,
    warn_if_slow,
)
from segmamba.training import trainer
from segmamba.training.trainer import Trainer

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Machine:
    """Plays a machine with a new NVIDIA GPU, gcc and Triton, unless told otherwise."""

    def __init__(self, monkeypatch, folder):
        self.patch = monkeypatch
        self.knobs = SimpleNamespace(
            runtime=SimpleNamespace(interpret=False),
            build=SimpleNamespace(cc=None, impl=None),
        )
        self.headers = folder
        (folder / "Python.h").touch()
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "a played GPU")
        monkeypatch.setattr(
            sysconfig, "get_paths", lambda scheme: {"include": str(folder)}
        )
        self.triton("3.6.0")
        self.compilers("gcc")
        self.capability(9, 0)

    def triton(self, version):
        self.patch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        self.patch.setitem(sys.modules, "triton.knobs", self.knobs)

    def compilers(self, *names):
        self.patch.setattr(
            shutil, "which", lambda name: f"/bin/{name}" if name in names else None
        )

    def capability(self, *numbers):
        self.patch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: numbers
        )


def forget():
    for function in (
        triton_status,
        backends.triton_is_interpreted,
        backends._warn_once,
    ):
        function.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    forget()
    yield Machine(monkeypatch, tmp_path)
    forget()


def take(device=GPU):
    return resolve_backend("auto", device=device, dtype=torch.float32)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_new_gpu_takes_triton(machine, compiler):
    machine.compilers(compiler)
    assert triton_status() == "available"
    assert automatic_backend(GPU) == ("triton", "")
    assert take(CPU) == "numba"


def test_without_a_compiler_the_gpu_works_and_says_what_to_install(machine):
    machine.compilers("cc", "make")  # Triton looks for gcc and clang only
    reason = triton_status()
    assert "C compiler" in reason
    assert "apt install gcc" in reason
    assert automatic_backend(GPU) == ("chunked", reason)
    with pytest.raises(BackendUnavailableError, match="apt install gcc"):
        resolve_backend("triton", device=GPU, dtype=torch.float32)


@pytest.mark.parametrize("knob", ["cc", "impl"])
def test_triton_may_be_told_of_a_compiler(machine, knob):
    machine.compilers()
    setattr(machine.knobs.build, knob, "/opt/bin/cc")
    assert triton_status() == "available"


def test_without_python_headers_it_says_what_to_install(machine):
    (machine.headers / "Python.h").unlink()
    assert "apt install python3-dev" in triton_status()
    assert take() == "chunked"


def test_old_gpus_other_vendors_and_old_tritons_take_chunked(machine, monkeypatch):
    machine.capability(7, 5)
    assert "capability is 7.5" in triton_status()
    assert take() == "chunked"
    forget()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in triton_status()
    assert take() == "chunked"
    forget()
    for version, fits in (("3.2.0", False), ("3.3.1", True), ("3.10.0+git", True)):
        machine.triton(version)
        forget()
        monkeypatch.setattr(torch.version, "hip", None)
        machine.capability(8, 0)
        assert (triton_status() == "available") == fits


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_take_chunked_without_a_reason(machine, kind):
    assert automatic_backend(torch.device(kind)) == ("chunked", "")


def test_the_norm_takes_the_same_path(machine):
    assert norm._status() == "available"
    machine.compilers()
    forget()
    x = torch.randn(1, 2, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    assert "apt install gcc" in norm._status()
    assert not norm._takes_triton(GpuTensor(x), None, "auto")
    assert instance_norm(x).shape == x.shape


class GpuTensor:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, x):
        self.x = x

    def __getattr__(self, name):
        return getattr(self.x, name)


def info():
    return dict(workflow.info()["Back ends of the scan"])


def test_info_states_the_path(machine):
    assert info()["auto takes on the CPU"] == "numba"
    assert info()["auto takes on the GPU"] == "triton"
    machine.compilers()
    forget()
    row = info()["auto takes on the GPU"]
    assert row.startswith("chunked, slower than it could be")
    assert "apt install gcc" in row


def test_info_knows_no_gpu_where_there_is_none(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "auto takes on the GPU" not in info()


def test_the_slow_path_is_told_once(machine, caplog):
    machine.compilers()
    with caplog.at_level(logging.WARNING, "segmamba"):
        for device in (CPU, GPU, GPU):
            warn_if_slow(device)
    assert len(caplog.messages) == 1
    assert "'chunked'" in caplog.text
    assert "apt install gcc" in caplog.text


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

    machine.compilers()
    monkeypatch.setattr(predictor, "_check", lambda *_: None)
    monkeypatch.setattr(module, "precision_for", stop)
    with pytest.raises(StopIteration):
        begin()
    assert "apt install gcc" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
def test_tritons_own_settings_are_where_they_are_looked_for():
    """With the Triton that is installed, not a played one."""
    from triton import knobs

    assert {"cc", "impl"} <= set(dir(knobs.build))
