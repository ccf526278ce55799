"""Names of devices and precisions, and what is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from segmamba.devices import (
    Arriving,
    autocast,
    available_devices,
    precision_for,
    resolve_device,
    wake,
)
from segmamba.errors import BackendUnavailableError, ConfigError

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_cpu_is_always_there():
    assert resolve_device("cpu") == CPU
    assert resolve_device(CPU) == CPU
    assert available_devices()["cpu"].startswith("available")
    assert set(available_devices()) == {"cpu", "cuda", "mps"}


@NO_GPU
def test_auto_without_a_gpu_is_the_cpu():
    assert resolve_device() == CPU


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_missing_gpu_says_what_was_found(name):
    with pytest.raises(BackendUnavailableError, match=f"'{name}' is not there: found"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "xpu", "cuda:x"])
def test_unknown_names_are_config_errors(name):
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda"):
        resolve_device(name)


def test_precisions():
    assert precision_for(CPU, "fp32") == "fp32"
    assert precision_for(CPU) in ("fp32", "bf16")
    assert precision_for(torch.device("mps")) == "fp32"
    with pytest.raises(ConfigError, match="fp64"):
        precision_for(CPU, "fp64")


def test_auto_follows_the_cpus_units(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert precision_for(CPU) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision_for(CPU) == "bf16"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_computes_so(precision, dtype):
    layer = torch.nn.Linear(3, 2)
    with autocast(CPU, precision):
        assert layer(torch.ones(1, 3)).dtype == dtype


def test_peak_memory_is_the_most_that_was_ever_held():
    """In a process of its own, whose peak is still low."""
    code = (
        "import torch\n"
        "from segmamba.devices import peak_memory_mib as peak\n"
        "cpu = torch.device('cpu')\n"
        "before = peak(cpu)\n"
        "size = int(before or 0) + 100\n"
        "torch.ones(size * 2**18)\n"
        "after = peak(cpu)\n"
        "print(before is None or size < after < before + size + 100)\n"
        "print(before is None or peak(cpu) >= after)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells it apart")
def test_peak_memory_is_not_that_of_the_starting_process():
    held = torch.ones(2**28)  # 1 GiB
    code = (
        "import torch\n"
        "from segmamba.devices import peak_memory_mib as peak\n"
        "print(peak(torch.device('cpu')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert held.numel() > 0
    assert 50 < float(result.stdout) < 1000


@pytest.mark.parametrize("device", ["auto", "cpu", "no such device", "cuda:99"])
def test_waking_leaves_errors_to_those_who_use_the_device(device):
    thread = wake(device)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waking_sets_up_a_gpu():
    code = (
        "import torch\n"
        "from segmamba.devices import wake\n"
        "assert not torch.cuda.is_initialized()\n"
        "wake('auto').join()\n"
        "print(torch.cuda.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


def test_numbers_arrive():
    values = torch.tensor([1.5, 2.5], requires_grad=True)
    assert Arriving(values).tolist() == [1.5, 2.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_arrive_from_a_gpu_without_waiting_for_what_was_launched_since():
    large = torch.randn(8192, 8192, device="cuda")
    large @ large  # the library's own start waits
    torch.cuda.synchronize()
    numbers = Arriving(torch.stack([large[0, 0] * 0 + 3, large[0, 0] * 0 + 4]))
    for _ in range(60):
        large @ large
    done = torch.cuda.Event()
    done.record()
    assert numbers.tolist() == [3, 4]
    assert not done.query()
