"""The autocast type follows what the device computes natively."""

from __future__ import annotations

import pytest
import torch

from segmamba.errors import BackendUnavailableError
from segmamba.training import precision
from segmamba.training.precision import autocast, precision_for, usable_device


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_cpu(monkeypatch, native, expected):
    monkeypatch.setattr(precision, "cpu_has_bf16_units", lambda: native)
    assert precision_for("cpu") == expected


@pytest.mark.parametrize(("major", "expected"), [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_cuda(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 5))
    assert precision_for("cuda:0") == expected


def test_other_devices_and_a_stated_wish():
    assert precision_for("mps") == "fp32"
    assert precision_for("cpu", "fp16") == "fp16"


def test_torch_without_the_private_question(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not precision.cpu_has_bf16_units()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast(name, dtype):
    with autocast(torch.device("cpu"), name):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_devices_by_name():
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("auto").type in ("cpu", "cuda")
    with pytest.raises(BackendUnavailableError, match="'quantum' can't be used"):
        usable_device("quantum")
